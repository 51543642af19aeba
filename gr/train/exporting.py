"""Taking a model out of its run: ``export`` writes what :mod:`gr.train.exported` reads.

It reads the weights of one checkpoint, whichever processes saved it, and builds no model; no more than a part of the
checkpoint is in memory, or where that has a table in columns, the rows that the columns belong to.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

import gr
from gr import config as configs
from gr.config import RunConfig
from gr.data.catalogue import Catalogue
from gr.data.outputs import ROWS_PER_GROUP, delivered_folder, parquet_rows
from gr.embeddings.vocabulary import MAPPING
from gr.errors import UserError
from gr.progress import Progress
from gr.train import checkpoint
from gr.train.changes import differences, within
from gr.train.checkpoint import find_checkpoint
from gr.train.exported import INDEX, ITEMS, MANIFEST, Fingerprint, Manifest, fingerprint, is_export, to_json
from gr.train.folder import RunFolder
from gr.train.parts import open_data
from gr.train.runs import check_generation, config_of
from gr.train.saved_weights import SavedWeights
from gr.train.tensor_files import LARGEST, Part, layout, write

CHANGEABLE = (
    "data.path",
    "data.prefetch",
    "eval",
    "model.table",
    "model.input.features.*.table",
    "model.item_tower.image.encoder",
    "model.item_tower.image.images",
    "model.item_tower.text.encoder",
    "model.item_tower.vectors",
    "model.user.fields.*.table",
    "model.item.fields.*.table",
    "train.device",
    "train.threads",
    "train.kernels",
    "train.start_from",
)
"""Keys that an export may have otherwise than its run: where it is computed, on what, and what is asked of it."""

_SLACK = 1 << 20  # bytes for config, manifest and index, beside parameters and items


def export(
    run: str | Path,
    out: str | Path,
    checkpoint_name: str = "last",
    overrides: Sequence[str] = (),
    *,
    largest: int = LARGEST,
    progress: Progress = Progress(),
) -> Manifest:
    """Write the folder ``out``: the model of a checkpoint (``last``, ``best`` or a step) of ``run``.

    overrides: dotted changes to the config, of the keys in ``CHANGEABLE``.  largest: bytes of parameters in a file.
    ``out`` appears when it is complete.  Raises UserError.
    """
    folder = RunFolder(run)
    if is_export(run):
        raise UserError(f"'{run}' is an export already: copy the folder")
    config = _changed(config_of(run), overrides)
    chosen = find_checkpoint(folder, checkpoint_name)
    state = checkpoint.read_state(chosen)
    cursor = state["cursor"]
    data = open_data(config, cursor["generation"])
    check_generation(data, cursor["generation"], run)
    weights, config_yaml = SavedWeights(chosen), configs.to_yaml(config)
    with delivered_folder(out, last=MANIFEST) as scratch:
        mappings = _mappings(weights)
        files = _files(weights, mappings, largest)
        _check_room(scratch, sum(part.bytes for parts in files.values() for part in parts))
        (scratch / folder.config.name).write_text(config_yaml)
        _write_items(scratch / ITEMS, data.catalogue)
        written = _write_weights(scratch, weights, files, progress)
        manifest = Manifest(
            gr=gr.__version__,
            run=folder.path.resolve().name,
            step=cursor["step"],
            epoch=cursor["epoch"],
            generation=cursor["generation"],
            model=config.model.name,
            sizes={name: list(size) for name, size in weights.sizes.items()},
            vocabularies={name: list(size) for name, size in mappings.items()},
            tensors=files,
            frozen=state.get("frozen", ""),
            encoders=state.get("encoders", {}),
            vectors=state.get("vectors", {}),
            made_of=state.get("made_of", {}),
            files={name: fingerprint(scratch / name) for name in (folder.config.name, ITEMS)} | written,
        )
        (scratch / MANIFEST).write_text(to_json(manifest))
    return manifest


def _mappings(weights: SavedWeights) -> dict[str, tuple[int, int]]:
    """The arrays of vocabularies that say which id has which row: of each (buckets, rows of a bucket).  Ids that wait,
    and when an id was seen last, are for training."""
    return {
        name: (size[0], weights.sizes[f"tables.{name.split('/')[1]}.weight"][0] // size[0])
        for name, size in sorted(weights.vocabularies.items())
        if name.endswith(MAPPING)
    }


def _files(
    weights: SavedWeights, mappings: Mapping[str, Sequence[int]], largest: int
) -> dict[str, list[Part]]:
    """File -> its parts.  Tables come last."""
    names = sorted(weights.sizes, key=lambda name: (name.startswith("tables."), name))
    return layout({name: weights.sizes[name] for name in names}, largest, mappings)


def _write_weights(
    folder: Path, weights: SavedWeights, files: dict[str, list[Part]], progress: Progress
) -> dict[str, Fingerprint]:
    """The fingerprints of all that was written."""
    written: dict[str, Fingerprint] = {}
    total = sum(part.bytes for parts in files.values() for part in parts)
    with progress.stage("exporting", total, "bytes") as stage:
        for name, parts in files.items():
            write(folder / name, parts, lambda part: _rows(weights, part, stage.advance))
            written[name] = fingerprint(folder / name)
    if len(files) > 1:
        (folder / INDEX).write_text(_index(files))
        written[INDEX] = fingerprint(folder / INDEX)
    return written


def summary(manifest: Manifest, run: str | Path, out: str | Path) -> list[str]:
    """Lines for the person who exported: what there is, and what to do with it."""
    # tables.NAME.COLUMN; deeper names are parts of what forms rows
    tables = {n: size for n, size in manifest.sizes.items() if n.startswith("tables.") and n.count(".") == 2}
    numbers = {name: math.prod(size) for name, size in manifest.sizes.items()}
    of_tables = sum(numbers[name] for name in tables)
    shapes = ", ".join(f"{name} {' x '.join(f'{n:,}' for n in size)}" for name, size in tables.items())
    width = max(map(len, manifest.files))
    lines = [f"exported step {manifest.step:,} of {run} to {out}"]
    for name, file in manifest.files.items():
        lines.append(f"  {name:<{width}}  {_size(file.bytes):>10}")
    ids = {name.split("/")[1]: math.prod(size) for name, size in manifest.vocabularies.items()}
    lines += [f"rows of the open vocabulary {name} {rows:,}, each with its id" for name, rows in ids.items()]
    in_tables = f", {of_tables:,} in tables ({shapes})" if tables else ""
    lines += [
        f"parameters {sum(numbers.values()):,} (float32): {sum(numbers.values()) - of_tables:,} dense{in_tables}",
        f"next  python -m gr evaluate --run {out} --split test",
    ]
    if manifest.model == "retrieval":
        lines.append(f"      python -m gr recommend --run {out} --users all --k 100 --out recs.parquet")
    return lines


def _size(bytes: int) -> str:
    unit = next((n for n in (3, 2, 1) if bytes >= 1 << 10 * n), 0)
    return f"{bytes / (1 << 10 * unit):,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}" if unit else f"{bytes} B"


def _changed(saved: RunConfig, overrides: Sequence[str]) -> RunConfig:
    config = configs.override(saved, overrides)
    for key, old, new in differences(saved, config):
        if not within(key, CHANGEABLE):
            raise UserError(
                f"'{key}' cannot change when exporting ({old!r} -> {new!r}): an export is its run's model; only "
                f"{', '.join(CHANGEABLE)} can"
            )
    return config


def _check_room(folder: Path, bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if bytes + _SLACK > free:
        raise UserError(
            f"an export of {_size(bytes)} doesn't fit in '{folder.parent}', which has {_size(free)} free: make room, "
            "or choose another --out"
        )


def _rows(weights: SavedWeights, part: Part, advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The rows of a part; refuses numbers that no training should have left."""
    for values in _as_saved(weights, part):
        if not torch.isfinite(values).all():
            raise UserError(
                f"parameter '{part.name}' in checkpoint '{weights.path}' has NaN or infinity: the run has diverged; "
                "choose an earlier --checkpoint"
            )
        if part.dtype == "I64":  # ids that wait stand behind those that have rows
            values = values[:, : part.size[1]]
        yield values
        advance(values.numel() * values.element_size())


def _as_saved(weights: SavedWeights, part: Part) -> Iterator[Tensor]:
    """The rows of a part, as long as the checkpoint is what was found whole."""
    try:
        yield from weights.rows(part.name, range(part.start, part.stop))
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        if (damage := checkpoint.damaged(weights.path)) is None:
            raise
        raise UserError(
            f"checkpoint '{weights.path}' changed while it was read ({damage}), perhaps because its training went on: "
            "export again, or when the training is over"
        ) from error


def _write_items(file: Path, catalogue: Catalogue) -> None:
    ids, counts_I = catalogue.column("item_id"), catalogue.training_counts.numpy()
    with parquet_rows(file) as append:
        for start in range(0, len(ids), ROWS_PER_GROUP):
            some = ids.slice(start, ROWS_PER_GROUP).combine_chunks()
            rows = np.arange(start, start + len(some))
            append(pa.table({"item_id": some, "row": rows, "training_count": counts_I[rows]}))


def _index(files: dict[str, list[Part]]) -> str:
    """In the form of sharded safetensors; entries with [start:stop] are rows of a tensor that is larger than a file."""
    place = {part.key: file for file, parts in files.items() for part in parts}
    total = sum(part.bytes for parts in files.values() for part in parts)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": place}, indent=1) + "\n"
