"""Putting adapters in: a trained network is left as it is, and small modules inside it train (Adapter4Rec, WSDM 2024).

Places are found by the names of modules, so that the same patterns fit BERT, RoBERTa, DistilBERT, OPT, ViT, MAE and
Swin; networks of ours have slots (gr.adapters.slot) for them, and say which rows of a weight make queries and values.
With every method but ``prompt`` the network's output is at first what it was, to the bit: what an adapter adds starts
from zero.  Nothing of the network is replaced or renamed, so that weights of a run without adapters load by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gr.adapters.modules import (
    RULES,
    Bottleneck,
    HypercomplexBottleneck,
    LowRank,
    LowRankRows,
    Prompt,
    Side,
)
from gr.adapters.section import AdapterSection
from gr.adapters.slot import Slot
from gr.errors import UserError
from gr_kernels.counter_random import derive_key

QUERY, VALUE = r"\.(query|q_proj|q_lin)$", r"\.(value|v_proj|v_lin)$"
ATTENTION_OUT = r"\.(attention\.output\.dense|out_proj|o_proj|out_lin|after_attention)$"
FEED_FORWARD_IN = r"\.(intermediate\.dense|fc1|lin1)$"
FEED_FORWARD_OUT = r"(?<!attention)\.(output\.dense|fc2|lin2|after_ffn|after_output)$"
BLOCK = r"\.(layer|layers|blocks)\.\d+$"
LAYERS = (
    r"(?P<stage>.*?\bstages\.\d+)\.layers\.\d+\.",  # ResNet
    r"(?P<stage>.*?\blayers\.\d+)\.blocks\.\d+\.",  # Swin
    r".*?\b(layer|layers|h|_blocks)\.\d+\.",
)
"""What a parameter of a layer is called, up to where the layer's name ends; the first that fits any is an encoder's."""
BEFORE_LAYERS = re.compile(r"embed|stem|\b(_bn0|wte|wpe)\b")
PATCHED = ("vit", "vit_mae", "deit")
"""Kinds of encoders of pictures whose tokens may be more than the patches."""

Named = list[tuple[str, nn.Parameter]]
Make = Callable[[int, int], nn.Module]
"""(inputs, outputs) -> an adapter."""


def insert(model: Any, section: AdapterSection, seed: int) -> None:
    """Freeze ``model`` and put adapters in; those that train are the parameters with gradients.  Their first values
    depend on (seed, name)."""
    if section.name == "full":
        return
    model.requires_grad_(False)
    added = METHODS[section.name](model, section.size)
    if section.norms and section.name != "frozen":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
    for name, parameter in added:
        parameter.requires_grad_(True)
        # of a LoRA as wide as its input asks for; of the others as their authors say
        _start(name, parameter, seed, parameter.shape[-1] ** -0.5 if section.name == "lora" else 0.01)


def freeze_layers(model: nn.Module, layers: int) -> None:
    """The first so many ``layers`` stay as they are, counted through all stages where there are some, and what comes
    before them: embeddings, a stem."""
    names = [name for name, _ in model.named_parameters()]
    pattern = next((p for p in LAYERS if any(re.match(p, name) for name in names)), None)
    found = {name: match for name in names if pattern and (match := re.match(pattern, name))}
    order = list(dict.fromkeys(match[0] for match in found.values()))
    if layers >= len(order):
        has = f"has {len(order)}" if order else "has none that their names tell"
        raise UserError(
            f"model.item_tower.freeze is {layers}, and the encoder, a {type(model).__name__}, {has}: leave one to "
            "train, or use model.item_tower.mode=frozen"
        )
    # what joins two stages goes with the one that it lies in
    training = {match.groupdict().get("stage") for match in found.values() if match[0] in order[layers:]}
    stages = {match.groupdict().get("stage") for match in found.values()} - training
    for name in names:
        in_stage = any(name.startswith(f"{stage}.") for stage in stages)
        if found[name][0] in order[:layers] if name in found else in_stage or BEFORE_LAYERS.search(name):
            model.get_parameter(name).requires_grad_(False)


def _named(name: str, module: nn.Module) -> Named:
    return [(f"{name}.{n}", parameter) for n, parameter in module.named_parameters()]


def _matching(model: nn.Module, *patterns: str) -> Iterator[tuple[str, Any]]:
    """Modules whose names match one of the patterns, in the network's order."""
    for name, module in model.named_modules():
        if any(re.search(pattern, f".{name}") for pattern in patterns):
            yield name, module


def _some(model: nn.Module, what: str, added: Named) -> Named:
    if not added:
        raise UserError(
            f"adapters {what} find no place in a {type(model).__name__} by the names of its modules: choose others, or "
            "another encoder"
        )
    return added


def _serial(model: nn.Module, what: str, make: Make, *patterns: str) -> Named:
    """After each place that matches: y becomes y + adapter(y)."""
    added: Named = []
    for name, module in _matching(model, *patterns):
        if isinstance(module, Slot):
            module.adapter = make(module.outputs, module.outputs)
        elif isinstance(module, nn.Linear):
            module.adapter = make(module.out_features, module.out_features)
            module.register_forward_hook(lambda module, inputs, output: output + module.adapter(output))
        else:
            continue
        added += _named(f"{name}.adapter", module.adapter)
    return _some(model, what, added)


def _houlsby(model: nn.Module, size: int) -> Named:
    def make(inputs: int, outputs: int) -> nn.Module:
        return Bottleneck(inputs, size, outputs)

    return _serial(model, "houlsby", make, ATTENTION_OUT, FEED_FORWARD_OUT)


def _pfeiffer(model: nn.Module, size: int) -> Named:
    def make(inputs: int, outputs: int) -> nn.Module:
        return Bottleneck(inputs, size, outputs)

    return _serial(model, "pfeiffer", make, FEED_FORWARD_OUT)


def _compacter(model: nn.Module, size: int) -> Named:
    rule = nn.Parameter(torch.empty(RULES, RULES, RULES))

    def make(inputs: int, outputs: int) -> nn.Module:
        return HypercomplexBottleneck(inputs, size, outputs, rule)

    return _serial(model, "compacter", make, ATTENTION_OUT, FEED_FORWARD_OUT)


def _parallel(model: nn.Module, size: int) -> Named:
    """Beside each sublayer: f(x) becomes f(x) + adapter(x)."""
    added: Named = []
    for first, last in ((QUERY, ATTENTION_OUT), (FEED_FORWARD_IN, FEED_FORWARD_OUT)):
        ends = [(name, module) for name, module in _matching(model, last)]
        for name, slot in ends:
            if isinstance(slot, Slot) and slot.inputs is not None:
                slot.adapter, slot.beside = Bottleneck(slot.inputs, size, slot.outputs), True
                added += _named(f"{name}.adapter", slot.adapter)
        linears = [(name, module) for name, module in ends if isinstance(module, nn.Linear)]
        starts = [module for _, module in _matching(model, first) if isinstance(module, nn.Linear)]
        if len(starts) != len(linears):
            continue
        for start, (name, end) in zip(starts, linears, strict=True):
            end.adapter = Bottleneck(start.in_features, size, end.out_features)
            _beside(start, end)
            added += _named(f"{name}.adapter", end.adapter)
    return _some(model, "parallel", added)


def _beside(start: nn.Module, end: Any) -> None:
    """What goes into ``start`` goes through the adapter of ``end``, and is added to what comes out there."""
    given: list[Tensor] = []
    start.register_forward_pre_hook(lambda module, inputs: given.__setitem__(slice(None), inputs[:1]))
    end.register_forward_hook(lambda module, inputs, output: output + module.adapter(given.pop()))


def _k_adapter(model: Any, size: int) -> Named:
    added: Named = []
    for name, stack in list(model.named_modules()):
        if hasattr(stack, "side"):  # a stack of ours
            above = model.get_submodule(name.rpartition(".")[0])
            # a list of modules takes each of its own for a layer: the module above has the parameters
            above.side = Side(_width_of(stack), size, len(stack))
            object.__setattr__(stack, "side", above.side)
            added += _named(f"{name.rpartition('.')[0]}.side", above.side)
    blocks: dict[str, nn.Module] = {} if added else dict(_matching(model, BLOCK))
    nested = any(other.startswith(f"{name}.") for name in blocks for other in blocks)
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if blocks and width and not nested:  # where they are nested, their widths differ
        side = model.side = Side(width, size, len(blocks))
        _run_beside(side, list(blocks.values()))
        added += _named("side", side)
    return _some(model, "k_adapter", added)


def _width_of(stack: Any) -> int:
    return next(
        module.outputs for module in stack[-1].modules() if isinstance(module, Slot) and module.inputs
    )


def _run_beside(side: Side, blocks: list[nn.Module]) -> None:
    """Give ``side`` what each of the blocks gives, and its sum to what the last one does."""
    states: list[Tensor] = []

    def watch(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden, *more = output if isinstance(output, tuple) else (output,)
            states[:] = [side(number, hidden, states.pop() if number else None)]
            if number + 1 < len(blocks):
                return None
            hidden = hidden + states.pop()
            return (hidden, *more) if isinstance(output, tuple) else hidden

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_hook(watch(number))


def _lora(model: nn.Module, size: int) -> Named:
    added: Named = []
    for name, linear in _matching(model, QUERY, VALUE):
        if isinstance(linear, nn.Linear):
            linear.adapter = LowRank(linear.in_features, size, linear.out_features)
            linear.register_forward_hook(lambda module, inputs, output: output + module.adapter(inputs[0]))
            added += _named(f"{name}.adapter", linear.adapter)
    for name, layer in model.named_modules():
        if parts := getattr(
            layer, "query_value", {}
        ):  # a linear layer of ours, which makes more than one of them
            layer.adapter = LowRankRows(layer.weight, parts, size)  # type: ignore[arg-type]
            added += _named(f"{name}.adapter", layer.adapter)
    return _some(model, "lora", added)


def _bitfit(model: nn.Module, size: int) -> Named:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return []


def _frozen(model: nn.Module, size: int) -> Named:
    return []


def _prompt(model: Any, size: int) -> Named:
    """The model keeps it as ``prompt``; who calls one of texts puts it in front."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    words = _words(model)
    if words is None and kind not in PATCHED:
        raise UserError(
            f"adapters prompt stand before the tokens of a text or behind the patches of a picture, and a "
            f"{type(model).__name__} has neither: choose others"
        )
    # of a text it goes in where its words do, which some encoders have narrower than what comes out
    model.prompt = prompt = Prompt(size, model.config.hidden_size if words is None else words.embedding_dim)
    if words is None:

        def behind(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (prompt.behind(output[0]), *output[1:])
            return prompt.behind(output)

        model.embeddings.register_forward_hook(behind)
    return [("prompt.vectors", prompt.vectors)]


def _words(model: Any) -> nn.Embedding | None:
    """The embeddings of words, of a network that reads such."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no network of transformers, or a convolutional one
        return None
    return found if isinstance(found, nn.Embedding) else None


METHODS: dict[str, Callable[[Any, int], Named]] = {
    "frozen": _frozen,
    "houlsby": _houlsby,
    "parallel": _parallel,
    "pfeiffer": _pfeiffer,
    "compacter": _compacter,
    "k_adapter": _k_adapter,
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
