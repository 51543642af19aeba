"""Encoders from transformers: what those of texts and of pictures share, and vectors of whole texts.

Shapes: n texts, L tokens of the longest of them, E the encoder's width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gr.errors import UserError
from gr.modality import efficientnet
from gr.modality.digest import digest, digest_of
from gr.modality.find import folder_of, loaded
from gr_kernels.tracing import on_paper_now, with_numbers

POOLING = Literal["mean", "cls"]
RATES = ("dropout", "attention_dropout", "activation_dropout")
LAYER_RATES = ("layerdrop", "drop_prob")
"""Of leaving whole layers out, or what they add (stochastic depth, which Swin and BEiT come with)."""

PLAIN = 64
"""Tokens of the longest text up to which attention is computed as it is written on a CPU: PyTorch's kernel takes up to
nine times as long there for its gradients in bfloat16, and as long in float32."""

SETTINGS = (
    *("model_type", "num_attention_heads", "num_heads", "layer_norm_eps", "norm_eps", "do_layer_norm_before"),
    *("hidden_act", "hidden_activation", "activation", "activation_function"),
    *("downsample_in_first_stage", "downsample_in_bottleneck"),
)


def transformers() -> Any:
    """The package, quiet; a UserError where it isn't installed."""
    try:
        import transformers as package
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(
            "an item tower's encoder needs the package 'transformers': make setup-encoders, or pip install "
            "'gr[encoders]'"
        ) from None
    from huggingface_hub.utils import logging as hub_logging  # transformers needs it

    package.utils.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it would tell of each time that it asks again
    package.utils.logging.disable_progress_bar()
    return package


def load_tokenizer(encoder: str) -> Any:
    """The fast tokenizer that comes with ``encoder``."""
    return loaded(encoder, _without_code("AutoTokenizer"))


class Encoder(nn.Module):
    """An encoder that transformers' AutoModel loads, called with what its kind takes: vectors (n, E) float32.

    encoder: as :func:`gr.modality.find.folder_of` reads it.  dropout: of everything in it that drops numbers (a
    pre-trained one's own rates are lost); layers are never left out.  plain: whether attention is computed as it is
    written, not by PyTorch's kernels.  Parameters are float32.
    """

    def __init__(self, encoder: str, pooling: POOLING, dropout: float = 0.0, *, plain: bool = False) -> None:
        super().__init__()
        self.name, self.pooling = encoder, pooling
        how = {"attn_implementation": "eager"} if plain else {}
        self.model: Any = _imagined(encoder, how) if on_paper_now() else _load_model(encoder, how).float()
        self.config: Any = self.model.config
        self.width = width_of(self.config)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            for name in (*RATES, *LAYER_RATES):  # some keep rates as numbers
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, dropout if name in RATES else 0.0)
        self.train()  # what was loaded comes as it is evaluated

    def _apply(self, fn: Any, recurse: bool = True) -> Encoder:
        """Move, but on paper, where it is nowhere."""
        return self if on_paper_now() else super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Encoder:
        """Of a convolutional encoder the statistics stay those that it came with: else what a picture becomes would
        hang on those beside it."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    def prepared(self, chunks: Iterable[Sequence[Tensor]]) -> Iterable[Sequence[Tensor]]:
        """What it is called with for each of a step's ``chunks``, given what the items are read as."""
        return chunks

    def statistics(self) -> dict[str, Tensor]:
        """What it came with that no gradient moves and no checkpoint has: running means of a convolutional one."""
        buffers, kept = dict(self.model.named_buffers()), self.model.state_dict()
        return {name: values for name, values in buffers.items() if name in kept}

    def weights_digest(self) -> str:
        """Of its weights alone, whatever a release of transformers says of them: 32 hexadecimal digits."""
        return digest_of(self.model.state_dict())


class TextEncoder(Encoder):
    """Any encoder of text, and a pooling of its last layer: the mean over the tokens of a text, or its first token
    (``cls``)."""

    def prepared(self, chunks: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        """With the rows of all tokens, looked up together: the gradient of a lookup is as large as the vocabulary's
        table, and one a chunk takes a quarter of a step."""
        chunks = list(chunks)
        if not (chunks and self._takes_words):
            yield from chunks
            return
        ids_V = torch.cat([ids_nL.flatten() for ids_nL, _ in chunks])
        words = self._words(ids_V).split([ids_nL.numel() for ids_nL, _ in chunks])
        for (ids_nL, mask_nL), words_VE in zip(chunks, words, strict=True):
            yield ids_nL, mask_nL, words_VE.unflatten(0, ids_nL.shape)

    def forward(self, ids_nL: Tensor, mask_nL: Tensor, words_nLE: Tensor | None = None) -> Tensor:
        """(n, E) float32.  ids_nL, mask_nL: int64; the mask is 1 where there is a token.  words_nLE: the tokens' rows,
        where they have been looked up (:meth:`prepared`)."""
        if self._takes_words:
            words_nLE = self._words(ids_nL) if words_nLE is None else words_nLE
            prompt, longer_nL = getattr(self.model, "prompt", None), mask_nL
            if prompt is not None:
                words_nLE, longer_nL = prompt.before(words_nLE, mask_nL)
            hidden_nLE = self.model(inputs_embeds=words_nLE, attention_mask=longer_nL).last_hidden_state
            hidden_nLE = hidden_nLE[:, -mask_nL.shape[1] :]
        else:
            hidden_nLE = self.model(input_ids=ids_nL, attention_mask=mask_nL).last_hidden_state
        if self.pooling == "cls":
            return hidden_nLE[:, 0].float()
        kept_nL1 = mask_nL[:, :, None].to(hidden_nLE.dtype)
        # the divisor is float32: a bfloat16 can't count
        return (hidden_nLE * kept_nL1).sum(1).float() / mask_nL.sum(1, keepdim=True).clamp_min(1)

    @property
    def _takes_words(self) -> bool:
        """Whether it can be given rows of tokens instead of tokens."""
        return "inputs_embeds" in inspect.signature(self.model.forward).parameters

    def _words(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]


def width_of(config: Any) -> int:
    """E; 0 of a kind that has none."""
    if (
        projected := getattr(config, "word_embed_proj_dim", None)
    ) is not None:  # OPT, whose small ones differ
        return int(projected)
    sizes = getattr(config, "hidden_sizes", None)
    return int(getattr(config, "hidden_size", 0) or (sizes[-1] if sizes else 0))


def unread(config: Any) -> Literal["text", "pictures"] | None:
    """What an encoder certainly doesn't read: of words or of pixels it says how many there are."""
    words, pixels = hasattr(config, "vocab_size"), hasattr(config, "num_channels")
    if isinstance(config, efficientnet.LiteConfig) or (pixels and not words):
        return "text"
    return "pictures" if words and not pixels else None


def settings_digest(config: Any) -> str:
    """Of what an encoder says of itself that its weights' shapes don't tell, and that makes other vectors of the same
    weights.  Not of all that it says: another release of transformers says more.  32 hexadecimal digits."""
    return digest(json.dumps({name: getattr(config, name, None) for name in SETTINGS}))


def config_of(encoder: str) -> Any:
    """What an encoder says of itself, without its weights."""
    return efficientnet.config_of(encoder) or loaded(encoder, _without_code("AutoConfig"))


def _without_code(kind: str) -> Callable[..., Any]:
    """What loads a ``kind`` of transformers; where code comes with it transformers would ask whether to run that."""
    return partial(getattr(transformers(), kind).from_pretrained, trust_remote_code=False)


def _load_model(encoder: str, how: Mapping[str, str]) -> nn.Module:
    if efficientnet.config_of(encoder) is not None:
        return efficientnet.load(encoder)
    package = transformers()

    def load(source: str, **settings: Any) -> nn.Module:
        settings |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, **how}
        try:
            model, found = package.AutoModel.from_pretrained(source, add_pooling_layer=False, **settings)
        except TypeError:  # a kind that has no such layer to leave out
            model, found = package.AutoModel.from_pretrained(source, **settings)
        if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers
            raise UserError(
                f"encoder '{encoder}' has no weights for {missing[0]}: give the folder of a whole "
                f"{type(model).__name__}"
            )
        return model

    return _of_one_width(loaded(encoder, load), encoder)


def _imagined(encoder: str, how: Mapping[str, str]) -> nn.Module:
    """What would be loaded, with shapes for weights: of an encoder's files a plan reads the config alone."""
    config = config_of(encoder)
    with with_numbers(), torch.device("meta"):
        if efficientnet.config_of(encoder) is not None:
            model = efficientnet.unloaded(encoder)
        else:
            make = transformers().AutoModel.from_config
            try:
                model = make(config, add_pooling_layer=False, **how)
            except TypeError:  # a kind that has no such layer to leave out
                model = make(config, **how)
    return _of_one_width(model.float().to_empty(device="cpu"), encoder)


def _of_one_width(model: Any, encoder: str) -> nn.Module:
    if not width_of(model.config) or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"encoder '{encoder}' is a {type(model).__name__}, which gives no vectors of one width: choose an encoder "
            "such as BERT, RoBERTa, OPT, a sentence encoder, ViT, Swin or ResNet"
        )
    return model  # type: ignore[no-any-return]


def where(encoder: str) -> str:
    """What people call the place of an encoder."""
    return str(folder_of(encoder) or encoder)
