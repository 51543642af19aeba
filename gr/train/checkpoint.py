"""Checkpoints: named fp32 parameters and moments through torch.distributed.checkpoint, and the cursor.

    checkpoints/step-00001234/    DCP's files
        state.json                cursor, config, format version
        complete.json             sizes and digests of all the others

A checkpoint is written beside its place, verified, and made visible by one rename, so that a kill at any moment
leaves the older ones whole.  It holds no partition of any engine: any number of processes loads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gr.errors import UserError
from gr.train.cursor import Cursor
from gr.train.parallel import Parallel

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cursor: Cursor,
    config: dict[str, Any],
    parallel: Parallel,
) -> Path:
    """Write the checkpoint of ``cursor.step``; every rank calls this.  Returns its path."""
    final = folder / f"step-{cursor.step:08d}"
    scratch = folder / f".writing-{final.name}"
    if parallel.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    parallel.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP tells every time that it runs in one process
        dcp.save(state_dict(model, optimizer), checkpoint_id=scratch, no_dist=parallel.ranks == 1)
    if parallel.is_main:
        state = {"format_version": FORMAT_VERSION, "cursor": asdict(cursor), "config": config}
        (scratch / "state.json").write_text(json.dumps(state, indent=1))
        files = {f.name: _fingerprint(f) for f in sorted(scratch.iterdir())}
        (scratch / "complete.json").write_text(json.dumps(files, indent=1))
        for file in scratch.iterdir():
            _sync(file)
        if final.exists():  # the same step again, with what the end of the epoch added
            shutil.rmtree(final)
        os.replace(scratch, final)
        _sync(folder)
    parallel.barrier()
    return final


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints and the best one."""
    for step, path in listed(folder)[:-keep]:
        if step != best_step:
            shutil.rmtree(path)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """Visible checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


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


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Cursor:
    """Fill ``model`` (and ``optimizer``) in place from the checkpoint at ``path``; returns its cursor."""
    cursor = Cursor(**read_state(path)["cursor"])
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}
    for name, entry in described.items():
        if isinstance(entry, TensorStorageMetadata) and (name.startswith("model/") or optimizer is not None):
            wanted[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    expected = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in expected.items():
        if name not in wanted:
            raise UserError(f"checkpoint '{path}' has no parameter '{name[6:]}': it is of another model")
        if wanted[name].shape != tensor.shape:
            raise UserError(
                f"parameter '{name[6:]}' is {list(wanted[name].shape)} in checkpoint '{path}' and "
                f"{list(tensor.shape)} in this model: the configs or datasets differ"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, checkpoint_id=path, no_dist=True)
    model.load_state_dict({name: wanted[f"model/{name}"] for name in model.state_dict()})
    if optimizer is not None:
        for parameter_name, parameter in model.named_parameters():
            moments: dict[str, Tensor] = {}
            for name, value in wanted.items():
                kind, _, rest = name.partition("/")
                moment, _, owner = rest.partition("/")
                if kind == "optimizer" and owner == parameter_name:
                    moments[moment] = value if moment == "step" else value.to(parameter.device)
            if moments:
                optimizer.state[parameter] = moments
    return cursor


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters as ``model/NAME`` and moments as ``optimizer/MOMENT/NAME``."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{moment}/{name}"] = torch.as_tensor(value)
    return tensors


def _fingerprint(file: Path) -> list:
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "blake2b").hexdigest()[:32]]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
