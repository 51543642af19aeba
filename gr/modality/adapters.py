"""Adapters: a frozen encoder is left as it is, and small modules inside it train (Adapter4Rec, WSDM 2024).

Modules are found by their names, so that the same patterns fit BERT, RoBERTa, OPT, ViT and their kin.  With every
method but ``prompt`` the encoder's output is at first what it was, to the bit: what an adapter adds starts from zero.

Shapes: n texts, L tokens, E width of the encoder, R of a bottleneck.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import POSITIVE, Section
from gr.errors import UserError
from gr_kernels.counter_random import derive_key

QUERY_VALUE = r"\.(query|value|q_proj|v_proj)$"
ATTENTION_OUT = r"\.(attention\.output\.dense|out_proj|o_proj)$"
FEED_FORWARD_OUT = r"(?<!attention)\.(output\.dense|fc2)$"
WITH_RESIDUAL = r"\.(attention\.output|(?<!attention\.)output)$"
"""Modules that are given a sublayer's output and its input, and add them before a LayerNorm (BERT, RoBERTa)."""


class AdapterSection(Section):
    """What trains inside the encoder.

    houlsby: x + up(gelu(down(x))) after the attention's and after the feed-forward's output, before Add & Norm
    (Houlsby et al., 2019); parallel: the same two beside the sublayers, LN(ad(x) + f(x) + x); pfeiffer: one, after the
    feed-forward (Pfeiffer et al., 2021); compacter: as houlsby, of hypercomplex layers, 4 shared rules, rank 1 (Karimi
    Mahabadi et al., 2021); lora: low-rank updates of queries and values (Hu et al., 2022), alpha = rank; bitfit: all
    biases (Ben Zaken et al., 2022); prompt: so many learned tokens before the text (Lester et al., 2021).
    size: of the bottleneck, the rank, or the number of tokens.  norms: LayerNorms train too.
    """

    shorthand = "name"
    name: Literal["houlsby", "parallel", "pfeiffer", "compacter", "lora", "bitfit", "prompt"] = "houlsby"
    size: POSITIVE = 64
    norms: bool = False

    def idle(self) -> dict[str, str]:
        return {"size": "name is bitfit"} if self.name == "bitfit" else {}


def insert(model: Any, section: AdapterSection, seed: int) -> None:
    """Freeze ``model`` and put adapters in; those that train are the parameters with gradients.  Their first values
    depend on (seed, name)."""
    model.requires_grad_(False)
    added = METHODS[section.name](model, section.size)
    # of a LoRA as wide as its input asks for; of the others as their authors say
    down = model.config.hidden_size**-0.5 if section.name == "lora" else 0.01
    if section.norms:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    for name, parameter in added:
        parameter.requires_grad_(True)
        _start(name, parameter, seed, down)


def freeze_layers(model: nn.Module, layers: int) -> None:
    """What comes before layer number ``layers`` stays as it is: embeddings too."""
    for name, parameter in model.named_parameters():
        number = re.search(r"\blayers?\.(\d+)\.", name)
        if (number is None and "embed" in name) or (number is not None and int(number[1]) < layers):
            parameter.requires_grad_(False)


class Bottleneck(nn.Module):
    """up(gelu(down(x))): E -> R -> E."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class Hypercomplex(nn.Module):
    """y = x W + b, W = sum_i rule_i (x) left_i right_i^T: Kronecker products of ``rule`` (4, 4, 4), which all layers
    of an encoder share, with matrices of rank 1."""

    def __init__(self, inputs: int, outputs: int, rule: nn.Parameter) -> None:
        super().__init__()
        parts = len(rule)
        if inputs % parts or outputs % parts:
            raise UserError(
                f"adapters compacter cut {inputs} and {outputs} numbers into {parts} parts: choose a size that {parts} "
                "divides"
            )
        self.rule = rule
        self.left = nn.Parameter(torch.empty(parts, inputs // parts))
        self.right = nn.Parameter(torch.empty(parts, outputs // parts))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("pab,pi,pj->aibj", self.rule, self.left, self.right)
        return x @ weight.reshape(x.shape[-1], -1) + self.bias


class HypercomplexBottleneck(nn.Module):
    """up(gelu(down(x))) of hypercomplex layers."""

    def __init__(self, width: int, size: int, rule: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up = Hypercomplex(width, size, rule), Hypercomplex(size, width, rule)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class Prompt(nn.Module):
    """Learned vectors of so many tokens, which stand before every text."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(size, width))

    def before(self, words_nLE: Tensor, mask_nL: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and mask with the prompt's in front."""
        prompt_nPE = self.vectors.to(words_nLE.dtype).expand(len(words_nLE), -1, -1)
        return torch.cat([prompt_nPE, words_nLE], dim=1), F.pad(mask_nL, (len(self.vectors), 0), value=1)


Named = list[tuple[str, nn.Parameter]]


def _found(model: nn.Module, pattern: str, what: str, kind: type = nn.Linear) -> Iterator[tuple[str, Any]]:
    modules = [
        (n, m) for n, m in model.named_modules() if re.search(pattern, f".{n}") and isinstance(m, kind)
    ]
    if not modules:
        raise UserError(
            f"adapters {what} find no place in a {type(model).__name__} (names that match {pattern}): choose lora, "
            "houlsby or bitfit, or another encoder"
        )
    return iter(modules)


def _bottlenecks(model: nn.Module, patterns: str, what: str, make: Callable[[int], nn.Module]) -> Named:
    """After each linear layer that matches: y becomes y + adapter(y)."""
    added: Named = []
    for name, linear in _found(model, patterns, what):
        adapter = make(linear.out_features)
        linear.adapter = adapter
        linear.register_forward_hook(lambda module, inputs, output: output + module.adapter(output))
        added += [(f"{name}.adapter.{n}", p) for n, p in adapter.named_parameters()]
    return added


def _houlsby(model: nn.Module, size: int) -> Named:
    both = f"{ATTENTION_OUT}|{FEED_FORWARD_OUT}"
    return _bottlenecks(model, both, "houlsby", lambda width: Bottleneck(width, size))


def _pfeiffer(model: nn.Module, size: int) -> Named:
    return _bottlenecks(model, FEED_FORWARD_OUT, "pfeiffer", lambda width: Bottleneck(width, size))


def _compacter(model: nn.Module, size: int) -> Named:
    rule = nn.Parameter(torch.empty(4, 4, 4))
    both = f"{ATTENTION_OUT}|{FEED_FORWARD_OUT}"
    return _bottlenecks(model, both, "compacter", lambda width: HypercomplexBottleneck(width, size, rule))


def _parallel(model: nn.Module, size: int) -> Named:
    added: Named = []
    for name, module in _found(model, WITH_RESIDUAL, "parallel", nn.Module):
        if not isinstance(getattr(module, "LayerNorm", None), nn.LayerNorm):
            continue
        module.adapter = Bottleneck(module.dense.out_features, size)
        module.register_forward_pre_hook(_beside)
        added += [(f"{name}.adapter.{n}", p) for n, p in module.adapter.named_parameters()]
    if not added:
        raise UserError(
            f"adapters parallel find no place in a {type(model).__name__}: choose houlsby or lora"
        )
    return added


def _beside(module: Any, arguments: tuple) -> tuple:
    """(f(x), x) -> (f(x), x + adapter(x)): the module adds the two."""
    output, x = arguments
    return output, x + module.adapter(x)


def _lora(model: nn.Module, size: int) -> Named:
    added: Named = []
    for name, linear in _found(model, QUERY_VALUE, "lora"):
        linear.adapter = nn.Sequential()
        linear.adapter.down = nn.Linear(linear.in_features, size, bias=False)
        linear.adapter.up = nn.Linear(size, linear.out_features, bias=False)
        linear.register_forward_hook(
            lambda module, inputs, output: output + module.adapter.up(module.adapter.down(inputs[0]))
        )
        added += [(f"{name}.adapter.{n}", p) for n, p in linear.adapter.named_parameters()]
    return added


def _bitfit(model: nn.Module, size: int) -> Named:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return []


def _prompt(model: Any, size: int) -> Named:
    """The model keeps it as ``prompt``; who calls the model puts it in front."""
    model.prompt = prompt = Prompt(size, model.config.hidden_size)
    return [("prompt.vectors", prompt.vectors)]


METHODS: dict[str, Callable[[nn.Module, int], Named]] = {
    "houlsby": _houlsby,
    "parallel": _parallel,
    "pfeiffer": _pfeiffer,
    "compacter": _compacter,
    "lora": _lora,
    "bitfit": _bitfit,
    "prompt": _prompt,
}


def _start(name: str, parameter: nn.Parameter, seed: int, down: float) -> None:
    """Biases and what leads up start from zero, so that nothing is added; what leads down from N(0, down^2)."""
    generator = torch.Generator().manual_seed(derive_key(seed, "parameter", name) >> 1)
    fresh = torch.empty(parameter.shape).normal_(generator=generator)
    shared = name.endswith((".rule", ".left"))  # a product's other factors: one that is zero is enough
    zero = name.endswith("bias") or (".up." in name and not shared)
    with torch.no_grad():
        parameter.copy_(torch.zeros_like(fresh) if zero else fresh * (0.5 if shared else down))
