"""Starting from another run's weights (``train.start_from``): the catalogues may differ, the model must not.

Taken is, by name, what another run has learnt that isn't about its own items, users or values: sequence encoder,
positions, heads and encoders of item towers.  Tables with a row for each of these are not.  What a model freezes is
taken anew wherever the model is built (resuming, evaluating, exporting), since its own checkpoints don't hold it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gr import config as configs
from gr.config import RunConfig, StartFrom
from gr.errors import UserError
from gr.models.model import Model
from gr.processes import Processes
from gr.train import checkpoint, exported
from gr.train.engines.engine import of_buffers
from gr.train.folder import RunFolder
from gr.train.frozen import OTHER_SETTINGS, frozen
from gr.train.place import StoreReader, place
from gr.train.tensor_files import TensorReader

log = logging.getLogger(__name__)
PRETRAINED = ".encoder.model."
"""In the name of a parameter that comes with an item tower's encoder, and needs no run to have learnt it."""


@dataclass(frozen=True)
class Source:
    """Weights of a run or of an export.  what: what people call it.  sizes: of its parameters, by name.  fill: tensors
    by name.  encoders: by table, the digest of an encoder that they were trained onto and that isn't among them.
    made_of: by table, digests of what its rows were formed from beside weights."""

    what: str
    sizes: Mapping[str, Sequence[int]]
    fill: Callable[[Mapping[str, Tensor]], None]
    encoders: Mapping[str, str]
    made_of: Mapping[str, Mapping[str, str]]


def start(model: Model, config: RunConfig, processes: Processes, *, begun: bool = False) -> None:
    """Fill ``model``, which an engine hasn't wrapped yet, with what ``train.start_from`` has of it; of a run that has
    ``begun`` (a checkpoint of its own has the rest) with what it freezes alone.  Nothing where the config names none.
    """
    section = config.train.start_from
    still = frozen(model)
    if section is None:
        if untaught := [name for name in still if PRETRAINED not in name]:
            raise UserError(
                f"parameter '{untaught[0]}' is frozen, and nothing has trained it: set train.start_from to a run that "
                "has, or let it train",
                everywhere=True,
            )
        return
    if begun and not still:
        return
    own: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_whole()}
    own |= {name.removeprefix("model/"): buffer for name, buffer in of_buffers(model).items()}
    taken: dict[str, Tensor] = {}
    sources = _sources(section)
    for source in sources:
        found = {name: own[name] for name in source.sizes if name in own}
        for name, tensor in found.items():
            if tuple(source.sizes[name]) != tuple(tensor.shape):
                raise UserError(
                    f"parameter '{name}' is {list(source.sizes[name])} in {source.what} and {list(tensor.shape)} in "
                    "this model: give both the same model and data.max_length",
                    everywhere=True,
                )
        if not begun:
            _check_encoders(source, model, found)
        source.fill({name: tensor for name, tensor in found.items() if not begun or name in still})
        taken |= found
    newest = sources[-1]
    if not taken:
        raise UserError(
            f"{newest.what} has nothing that this model has too, but tables of its own data: start from a run of the "
            "same kind of model",
            everywhere=True,
        )
    if lacking := [name for name in still if name not in taken and PRETRAINED not in name]:
        raise UserError(
            f"parameter '{lacking[0]}' is frozen, and {newest.what} hasn't trained it: let it train, or start from a "
            "run that has it",
            everywhere=True,
        )
    if processes.is_main and not begun:
        _say(model, own, taken, newest)


def _check_encoders(source: Source, model: Model, found: Iterable[str]) -> None:
    """Refuse a head, or a fusion, that was trained onto the vectors of another encoder than this model's, and what was
    trained with another tokenizer, or with weights that computed otherwise."""
    for name, table in model.tables.items():
        if not any(parameter.startswith(f"tables.{name}.") for parameter in found):
            continue
        before, now = source.made_of.get(name, {}), table.made_of()
        for kind, what in (("tokenizer", "another tokenizer"), ("settings", OTHER_SETTINGS)):
            if kind in before and now.get(kind, before[kind]) != before[kind]:
                raise UserError(
                    f"{source.what} was trained with {what} than the encoder of model.item_tower comes with: name an "
                    f"encoder with that one's {kind}",
                    everywhere=True,
                )
        encoder = source.encoders.get(name)
        if encoder and table.encoder_digest() not in ("", encoder):
            raise UserError(
                f"{source.what} was trained onto another encoder than model.item_tower names, and doesn't have it: "
                "name that one, or start from a run that tuned its own",
                everywhere=True,
            )


def _say(model: Model, own: Mapping[str, Tensor], taken: Mapping[str, Tensor], source: Source) -> None:
    print(f"starting from {source.what}: {_counted(taken, taken)} taken", flush=True)
    if left := [name for name in source.sizes if name not in own]:
        print(f"  left there, as rows or parts that this model hasn't: {_named(left)}", flush=True)
    if fresh := {name: values for name, values in own.items() if name not in taken}:
        print(f"  not from there: {_counted(fresh, fresh)}", flush=True)
    if still := frozen(model):
        training = {name: values for name, values in own.items() if name not in still}
        print(f"  training: {_counted(training, own)}", flush=True)


def _counted(tensors: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> str:
    """``3 tensors, 1,203 numbers (encoder 1,000, input 203)``; of how many, where those are more."""
    parts: dict[str, int] = {}
    for name, values in tensors.items():
        words = name.split(".")
        part = ".".join(words[:3] if words[0] == "tables" else words[:1])
        parts[part] = parts.get(part, 0) + values.numel()
    total, whole = sum(parts.values()), sum(values.numel() for values in of.values())
    share = "" if total == whole else f" of {whole:,}"
    listed = ", ".join(f"{part} {numbers:,}" for part, numbers in parts.items())
    return f"{len(tensors)} tensors, {total:,}{share} numbers" + (f" ({listed})" if listed else "")


def _named(names: Iterable[str]) -> str:
    first, rest = list(names)[:4], len(list(names)) - 4
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


def _sources(section: StartFrom) -> list[Source]:
    """The run's weights, behind those of the run that it froze a part of, if it did."""
    of = _export if exported.is_export(section.run) else _run
    source, digest = of(section)
    under = configs.load(RunFolder.existing(section.run).config).train.start_from if digest else None
    return [*(_sources(under) if under is not None else []), source]


def _export(section: StartFrom) -> tuple[Source, str]:
    """An export's weights, and the digest of what it froze, "" where that is nothing."""
    manifest = exported.read_manifest(section.run)
    if section.checkpoint not in ("last", str(manifest.step)):
        raise UserError(
            f"export '{section.run}' is of step {manifest.step} and has no checkpoint '{section.checkpoint}': "
            "leave train.start_from.checkpoint out",
            everywhere=True,
        )
    exported.check(section.run, manifest)

    def fill(tensors: Mapping[str, Tensor]) -> None:
        with TensorReader(place(section.run), manifest.tensors) as files:
            for name, values in tensors.items():
                files.read_into(name, [0] * values.dim(), values)

    what = f"export '{section.run}', step {manifest.step}"
    return Source(what, manifest.sizes, fill, manifest.encoders, manifest.made_of), manifest.frozen


def _run(section: StartFrom) -> tuple[Source, str]:
    """Likewise of a run's checkpoint."""
    path = checkpoint.find_checkpoint(RunFolder.existing(section.run), section.checkpoint)
    reader, state = StoreReader(path), checkpoint.read_state(path)
    entries = checkpoint.described(reader)
    sizes = {name.removeprefix("model/"): e.size for name, e in entries.items() if name.startswith("model/")}

    def fill(tensors: Mapping[str, Tensor]) -> None:
        checkpoint.fill({f"model/{name}": values for name, values in tensors.items()}, reader)

    what = f"run '{section.run}', step {state['cursor']['step']}"
    source = Source(what, sizes, fill, state.get("encoders", {}), state.get("made_of", {}))
    return source, state.get("frozen", "")
