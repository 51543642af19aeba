"""Checkpoints: named fp32 parameters and moments through torch.distributed.checkpoint, and the cursor.

    checkpoints/step-00001234/    DCP's files
        state.json                cursor, config, format version
        complete.json             sizes and digests of all the others

A checkpoint is written beside its place, digested, and made visible by one rename, so that a kill at any moment
leaves the older ones whole (one of the same step is step-00001234.replaced meanwhile).  It holds no partition of
any engine: any number of processes loads it.

In a store nothing can be renamed: each process writes its files to a folder for temporary files and brings them to
their place, and complete.json comes last: what has none is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from gr.data.outputs import sync
from gr.data.stores import StoreError
from gr.errors import UserError
from gr.models.model import Model
from gr.processes import Axis, Processes
from gr.train.cursor import Cursor
from gr.train.engines.engine import Engine, of_vocabularies, parameters
from gr.train.folder import RunFolder
from gr.train.frozen import check_noted
from gr.train.place import LAST, AnyPath, StorePath, StoreReader, remove_tree
from gr.train.slices import Slices, shared_out

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_SCRATCH = ".writing-"
log = logging.getLogger(__name__)


def save(
    folder: AnyPath,
    tensors: Mapping[str, Tensor],
    cursor: Cursor,
    config: dict[str, Any],
    processes: Processes,
    noted: Mapping[str, Any] | None = None,
) -> AnyPath:
    """Write ``tensors`` (an engine's) as the checkpoint of ``cursor.step``; every rank calls this, and digests what it
    wrote.  noted: of what the model is made of and isn't written (:func:`gr.train.frozen.noted`).  Its path.

    UserError, on every rank: it can't be written; older ones are whole."""
    final = folder / f"step-{cursor.step:08d}"
    with _refusing(final), ExitStack() as held:
        if isinstance(folder, StorePath):  # machines with disks of their own
            temporary = tempfile.TemporaryDirectory(prefix="gr-checkpoint-", ignore_cleanup_errors=True)
            scratch = Path(held.enter_context(temporary))
        else:
            scratch = folder / f"{_SCRATCH}{final.name}"
            processes.together(lambda: _make(scratch) if processes.is_main else None)
        with quiet():
            shares = shared_out(tensors, processes.world)
            dcp.save(
                {name: t.cut() if isinstance(t, Slices) else t for name, t in shares.items()},
                checkpoint_id=scratch,
                no_dist=processes.world.size == 1,
                process_group=processes.world.group,
            )  # it syncs what it writes
        own = list(scratch.glob(f"__{processes.world.rank}_*.distcp"))
        written = processes.everybodys({file.name: _fingerprint(file) for file in own})
        if isinstance(final, StorePath):
            processes.together(lambda: _make_room(final) if processes.is_main else None)
            processes.together(lambda: _upload(own, final))
        state = {
            "format_version": FORMAT_VERSION,
            "cursor": asdict(cursor),
            "config": config,
            **(noted or {}),
        }
        files = {name: fingerprint for of_rank in written for name, fingerprint in of_rank.items()}
        processes.together(lambda: _publish(scratch, final, state, files) if processes.is_main else None)
    return final


def _make(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(scratch, error) from error


def _publish(scratch: Path, final: AnyPath, state: dict[str, Any], files: dict[str, list]) -> None:
    """Complete ``scratch`` and make it visible.  ``files``: the fingerprints of those that ranks have digested."""
    of_ranks = set(files)
    try:
        (scratch / "state.json").write_text(json.dumps(state, indent=1))
        for file in scratch.iterdir():
            if file.name not in files:
                files[file.name] = _fingerprint(file)
        (scratch / LAST).write_text(json.dumps(dict(sorted(files.items())), indent=1))
        if isinstance(final, StorePath):
            _upload([scratch / name for name in files if name not in of_ranks], final)
            _upload([scratch / LAST], final)
            _replaced(final).remove_tree()
            return
        for path in (scratch / "state.json", scratch / LAST, scratch):
            sync(path)
        replaced = _replaced(final)
        if final.exists():  # the same step again: a run that goes on and ends where it was
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(scratch, final)
        sync(final.parent)
    except OSError as error:
        raise _unwritable(final, error) from error
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(final: Any) -> Any:
    return final.with_name(f"{final.name}.replaced")


def _make_room(final: StorePath) -> None:
    """What is at a checkpoint's place in a store makes room; a whole one stays as it is under another name."""
    try:
        if (final / LAST).is_file():
            final.copy_tree(_replaced(final))
        final.remove_tree()
    except OSError as error:
        raise _unwritable(final, error) from error


def _upload(files: Sequence[Path], final: StorePath) -> None:
    try:
        for file in files:
            final.upload(file, file.name)
    except OSError as error:
        raise _unwritable(final, error) from error


@contextmanager
def _refusing(path: AnyPath) -> Iterator[None]:
    """DCP's word for a disk that is full or not there, as a sentence; it has said it to every rank."""
    try:
        yield
    except CheckpointException as error:
        for rank, (cause, _) in error.failures.items():
            if isinstance(cause, OSError):
                raise _unwritable(path, cause, f" on rank {rank}") from error
        raise RuntimeError(f"checkpoint '{path}' could not be written: {error}") from error


def _unwritable(path: AnyPath, error: OSError, where: str = "") -> UserError:
    return UserError(
        f"checkpoint '{path}' can't be written{where} ({error.strerror or error}): older ones are whole; make room, or "
        "see to the disk, and go on with --resume",
        everywhere=True,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """DCP tells every time that it runs in one process.  (Only one thread may change what is warned of.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def prune(folder: AnyPath, keep: int, step: int, best_step: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``, the one just saved, and the best one.

    Those of later steps go too: training did not continue from them, so they are damaged.
    """
    found = listed(folder)
    if isinstance(folder, StorePath):  # of processes that were killed
        whole = {path for _, path in found}
        unfinished: list[AnyPath] = [path for path in folder.iterdir() if path not in whole]
    else:
        unfinished = list(folder.glob(f"{_SCRATCH}*"))
    for path in unfinished:
        remove_tree(path)
    kept = {path for _, path in [entry for entry in found if entry[0] <= step][-keep:]}
    for number, path in found:
        if path not in kept and (number != best_step or path.suffix):
            remove_tree(path)


def listed(folder: AnyPath) -> list[tuple[int, AnyPath]]:
    """Visible checkpoints with their steps, oldest first."""
    if isinstance(folder, StorePath):
        names = [name.partition("/") for name in folder.tree()]
        there: list[AnyPath] = [folder / name for name, _, file in names if file == LAST]
    else:
        there = list(folder.iterdir()) if folder.is_dir() else []
    matches = [(match, path) for path in there if (match := _NAME.fullmatch(path.name))]
    matches.sort(key=lambda entry: (int(entry[0][1]), entry[0][2] is None))
    return [(int(match[1]), path) for match, path in matches]


def newest(folder: AnyPath, processes: Processes | None = None) -> AnyPath | None:
    """The newest complete checkpoint; damaged ones are named and skipped.  ``processes``: all ask together, and each
    looks at its share of the files."""
    main = processes is None or processes.is_main
    found = listed(folder) if main else []
    for _, path in reversed(found if processes is None else processes.broadcast(found)):
        if (damage := damaged(path, processes)) is None:
            return path
        if main:
            log.warning("skipping damaged checkpoint '%s': %s", path, damage)
    return None


def damaged(path: AnyPath, processes: Processes | None = None) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None; every one of ``processes`` looks at its share."""
    if processes is None:
        return _damage(path, Axis())
    found = processes.everybodys(_damage(path, processes.world))
    return next((damage for damage in found if damage is not None), None)


def _damage(path: AnyPath, axis: Axis) -> str | None:
    try:
        files = json.loads((path / LAST).read_text())
    except StoreError:  # an answer that doesn't come says nothing of the checkpoint
        raise
    except (OSError, ValueError):
        return "complete.json is missing or unreadable"
    for name, fingerprint in list(files.items())[axis.rank :: axis.size]:
        try:
            found = _fingerprint(path / name)
        except (FileNotFoundError, IsADirectoryError):
            return f"{name} is missing"
        if found != fingerprint:
            return f"{name} is not what was written"
    return None


def find_checkpoint(folder: RunFolder, name: str) -> AnyPath:
    """The path of a checkpoint: ``last``, ``best`` or a step number."""
    last = newest(folder.checkpoints)
    if last is None:
        raise UserError(f"run '{folder.path}' has no complete checkpoint yet: let it train, or --resume it")
    if name == "last":
        return last
    steps = dict(listed(folder.checkpoints))
    if name == "best":
        best = read_state(last)["cursor"]["best"]
        if not best:
            raise UserError(
                f"run '{folder.path}' has no best checkpoint: it evaluated no validation split "
                "(data.split.holdout=2 and eval.splits=[valid, test])"
            )
        name = str(int(best["step"]))
        if int(name) not in steps:  # another metric chose then, and the checkpoint was pruned
            raise UserError(
                f"run '{folder.path}' is best at step {name} (by {best['metric']}), of which no checkpoint was kept: "
                f"choose one of {', '.join(map(str, steps))}"
            )
    if not name.isdigit() or int(name) not in steps:
        raise UserError(
            f"run '{folder.path}' has no checkpoint '{name}': it has last, best and the steps "
            f"{', '.join(map(str, steps))}"
        )
    chosen = steps[int(name)]
    if (damage := damaged(chosen)) is not None:
        raise UserError(f"checkpoint '{chosen}' is damaged ({damage}): choose another one")
    return chosen


def read_state(path: AnyPath) -> dict[str, Any]:
    """``cursor``, ``config``, ``format_version`` of a checkpoint, and what was noted of the model."""
    state = json.loads((path / "state.json").read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"checkpoint '{path}' has format version {state['format_version']}, this gr reads {FORMAT_VERSION}: "
            "continue it with the gr that wrote it"
        )
    return state


def load(path: AnyPath, model: Model, engine: Engine | None = None, *, growing: bool = False) -> Cursor:
    """Fill ``model``, its tables (and ``engine``'s moments) in place from the checkpoint at ``path``; returns its
    cursor.  ``growing``: tables may have more rows than there; those behind keep their first values, and no moments."""
    state = read_state(path)
    cursor = Cursor(**state["cursor"])
    check_noted(f"checkpoint '{path}'", state, model, growing=growing)
    reader = StoreReader(path)
    sizes = {name: entry.size for name, entry in described(reader).items()}
    if engine is None:
        wanted = parameters(model) | of_vocabularies(model)
    else:
        wanted = engine.load(list(sizes))
    filled = {name: _first_rows(t, sizes.get(name)) for name, t in wanted.items()} if growing else wanted
    check_tensors(f"checkpoint '{path}'", sizes, filled, model)
    if engine is not None and cursor.step and (lacking := engine.lacking(wanted)):
        raise UserError(
            f"checkpoint '{path}' has the weights but no {_words(lacking[0])}, without which training can't go on: "
            "choose an older checkpoint, or start a new run"
        )
    fill(filled, reader)
    if engine is not None:
        engine.loaded(wanted)
    return cursor


def _first_rows(tensor: Tensor, size: Sequence[int] | None) -> Tensor:
    """The first rows of a tensor, its own memory, as many as one of ``size`` has; all where that has another form."""
    if size is None or isinstance(tensor, DTensor) or tuple(size[1:]) != tuple(tensor.shape[1:]) or not size:
        return tensor
    rows = size[0]
    if rows >= tensor.shape[0]:
        return tensor
    if not isinstance(tensor, Slices):
        return tensor[:rows]
    parts = [(offsets, values[: max(rows - offsets[0], 0)]) for offsets, values in tensor.parts.items()]
    return Slices(size, parts)


def described(reader: dcp.FileSystemReader) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint says of its tensors, parameters and moments."""
    entries = reader.read_metadata().state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def fill(wanted: dict[str, Tensor], reader: dcp.FileSystemReader) -> None:
    """Fill tensors, or slices of them, from a checkpoint; what isn't ``wanted`` isn't read."""
    with quiet():
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
    if kind in ("model", "vocabulary", "kept"):
        return f"{'parameter' if kind == 'model' else kind} '{rest}'"
    moment, _, owner = rest.partition("/")
    return f"{moment} of '{owner}'"


def _fingerprint(file: AnyPath) -> list:
    with file.open("rb") as content:
        return [file.stat().st_size, hashlib.file_digest(content, "blake2b").hexdigest()[:32]]
