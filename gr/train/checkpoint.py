"""Checkpoints: named fp32 parameters and moments through torch.distributed.checkpoint, and the cursor.

    checkpoints/step-00001234/    DCP's files
        state.json                cursor, config, format version
        complete.json             sizes and digests of all the others

A checkpoint is written beside its place, digested, and made visible by one rename, so that a kill at any moment
leaves the older ones whole (one of the same step is step-00001234.replaced meanwhile).  It holds no partition of
any engine: any number of processes loads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gr.errors import UserError
from gr.models.model import Model
from gr.processes import Processes
from gr.train.cursor import Cursor
from gr.train.engines.engine import Engine, of_vocabularies, parameters
from gr.train.folder import sync

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_SCRATCH = ".writing-"
log = logging.getLogger(__name__)


def save(
    folder: Path, tensors: dict[str, Tensor], cursor: Cursor, config: dict[str, Any], processes: Processes
) -> Path:
    """Write ``tensors`` (an engine's) as the checkpoint of ``cursor.step``; every rank calls this.  Its path."""
    final = folder / f"step-{cursor.step:08d}"
    scratch = folder / f"{_SCRATCH}{final.name}"
    if processes.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    processes.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP tells every time that it runs in one process
        dcp.save(dict(tensors), checkpoint_id=scratch, no_dist=processes.world.size == 1)
    if processes.is_main:
        state = {"format_version": FORMAT_VERSION, "cursor": asdict(cursor), "config": config}
        (scratch / "state.json").write_text(json.dumps(state, indent=1))
        files = {f.name: _fingerprint(f) for f in sorted(scratch.iterdir())}
        (scratch / "complete.json").write_text(json.dumps(files, indent=1))
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        replaced = folder / f"{final.name}.replaced"
        if final.exists():  # the same step again: a run that goes on and ends where it was
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(scratch, final)
        sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    processes.barrier()
    return final


def prune(folder: Path, keep: int, step: int, best_step: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``, the one just saved, and the best one.

    Those of later steps go too: training did not continue from them, so they are damaged.
    """
    for path in folder.glob(f"{_SCRATCH}*"):  # of processes that were killed
        shutil.rmtree(path)
    found = listed(folder)
    kept = {path for _, path in [entry for entry in found if entry[0] <= step][-keep:]}
    for number, path in found:
        if path not in kept and (number != best_step or path.suffix):
            shutil.rmtree(path)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """Visible checkpoints with their steps, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    matches.sort(key=lambda entry: (int(entry[0][1]), entry[0][2] is None))
    return [(int(match[1]), path) for match, path in matches]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones are named and skipped."""
    for _, path in reversed(listed(folder)):
        if (damage := damaged(path)) is None:
            return path
        log.warning("skipping damaged checkpoint '%s': %s", path, damage)
    return None


def damaged(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None."""
    try:
        files = json.loads((path / "complete.json").read_text())
    except (OSError, ValueError):
        return "complete.json is missing or unreadable"
    for name, fingerprint in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != fingerprint:
            return f"{name} is not what was written"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """``cursor``, ``config`` and ``format_version`` of a checkpoint."""
    state = json.loads((path / "state.json").read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint '{path}' has format version {state['format_version']}, this gr reads {FORMAT_VERSION}: "
            "continue it with the gr that wrote it"
        )
    return state


def load(path: Path, model: Model, engine: Engine | None = None) -> Cursor:
    """Fill ``model``, its tables (and ``engine``'s moments) in place from the checkpoint at ``path``; returns its
    cursor."""
    cursor = Cursor(**read_state(path)["cursor"])
    reader = dcp.FileSystemReader(path)
    sizes = {name: entry.size for name, entry in described(reader).items()}
    if engine is None:
        wanted = parameters(model) | of_vocabularies(model)
    else:
        wanted = engine.load(list(sizes))
    check_tensors(f"checkpoint '{path}'", sizes, wanted, model)
    if engine is not None and cursor.step and (lacking := engine.lacking(wanted)):
        raise UserError(
            f"checkpoint '{path}' has the weights but no {_words(lacking[0])}, without which training can't go on: "
            "choose an older checkpoint, or start a new run"
        )
    fill(wanted, reader)
    if engine is not None:
        engine.loaded(wanted)
    return cursor


def described(reader: dcp.FileSystemReader) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint says of its tensors, parameters and moments."""
    entries = reader.read_metadata().state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def fill(wanted: dict[str, Tensor], reader: dcp.FileSystemReader) -> None:
    """Fill tensors, or slices of them, from a checkpoint; what isn't ``wanted`` isn't read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, storage_reader=reader, no_dist=True)


def check_tensors(
    what: str, sizes: Mapping[str, Sequence[int]], wanted: Mapping[str, Tensor], model: Model
) -> None:
    """Refuse to fill ``wanted``, of ``model``, from a file whose tensors have ``sizes``, where that is of another
    model.  ``what``: what people call the file."""
    if foreign := [n for n in sizes if n.startswith("model/") and n not in parameters(model)]:
        raise UserError(f"{what} has {_words(foreign[0])}, which this model has not: it is of another model")
    for name, tensor in wanted.items():
        if name not in sizes:
            raise UserError(f"{what} has no {_words(name)}: it is of another model")
        if tuple(sizes[name]) != tuple(tensor.shape):
            raise UserError(
                f"{_words(name)} is {list(sizes[name])} in {what} and {list(tensor.shape)} in this model: "
                "the configs or datasets differ"
            )


def _words(name: str) -> str:
    """A tensor's name in a checkpoint, for people."""
    kind, _, rest = name.partition("/")
    if kind in ("model", "vocabulary"):
        return f"{'parameter' if kind == 'model' else kind} '{rest}'"
    moment, _, owner = rest.partition("/")
    return f"{moment} of '{owner}'"


def _fingerprint(file: Path) -> list:
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "blake2b").hexdigest()[:32]]
