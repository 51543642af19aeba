"""An export: a model out of its run, in a folder or store of its own, that is evaluated and recommends as the run does.

    export.json                    what this is: step, dataset, where each tensor lies; sizes and digests of the others
    config.yaml                    the run's, resolved
    model.safetensors              parameters, float32, and the ids of open vocabularies, int64; several files where
                                   they are larger than one may be, and then
    model.safetensors.index.json   the file of each entry, in the form that others read
    items.parquet                  item_id, row (of the item table), training_count

Of an open vocabulary of G buckets of S rows, ``vocabulary/TABLE/keys`` (G, S) are the ids that have the rows of the
table ``tables.TABLE.weight``, row by row, where ``vocabulary/TABLE/counts`` (G, S), how often each was seen, isn't 0.

No pickle is among them, and no moments: training doesn't go on from an export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gr.data.stores import remedy
from gr.errors import UserError, first_line
from gr.models.model import Model
from gr.processes import Axis
from gr.train import checkpoint
from gr.train.cursor import Cursor
from gr.train.engines.engine import mappings_of, parameters
from gr.train.frozen import check_noted
from gr.train.place import AnyPath, files_in, place
from gr.train.slices import held_parts
from gr.train.tensor_files import Part, TensorReader

FORMAT_VERSION = 2
MANIFEST, ITEMS, INDEX = "export.json", "items.parquet", "model.safetensors.index.json"


@dataclass(frozen=True)
class Fingerprint:
    """``sha256``: as the program sha256sum prints it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``run``: the name of its folder.  ``generation``: the dataset's.  ``model``: its kind.  ``sizes``: of the
    parameters, by name; ``vocabularies``: of their arrays.  ``tensors``: file -> its parts of both.  ``files``: all but
    the manifest itself.  ``frozen``, ``encoders``, ``vectors``, ``made_of``: of what its model is made of
    and isn't here (:func:`gr.train.frozen.noted`).  ``digest``: of all else that stands here."""

    gr: str
    run: str
    step: int
    epoch: int
    generation: str
    model: str
    sizes: dict[str, list[int]]
    tensors: dict[str, list[Part]]
    files: dict[str, Fingerprint]
    vocabularies: dict[str, list[int]] = field(default_factory=dict)
    frozen: str = ""
    encoders: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_of: dict[str, dict[str, str]] = field(default_factory=dict)
    digest: str = ""
    format_version: int = field(default=FORMAT_VERSION)


def is_export(path: str | Path) -> bool:
    """Whether a folder, or a place in a store, is one, however damaged."""
    names = _names(path)
    return MANIFEST in names or any(fnmatch(name, "model*.safetensors") for name in names)


def to_json(manifest: Manifest) -> str:
    return json.dumps(asdict(replace(manifest, digest=_digest(asdict(manifest)))), indent=1)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the export at ``path``; a UserError where there is none, or it is damaged or of another
    version of the format."""
    if MANIFEST not in _names(path):
        raise _damaged(path, f"{MANIFEST} is missing")
    try:
        with _reading(path):
            said: dict[str, Any] = json.loads((place(path) / MANIFEST).read_text())
        version, digest = said["format_version"], said["digest"]
    except (ValueError, KeyError, TypeError):  # bytes that are no UTF-8, no JSON, not this JSON
        raise _damaged(path, f"{MANIFEST} is not what was written") from None
    if digest != _digest(said):
        raise _damaged(path, f"{MANIFEST} is not what was written")
    if version != FORMAT_VERSION:
        raise UserError(
            f"export '{path}' has format version {version}, this gr reads {FORMAT_VERSION}: export the run with this gr"
        )
    tensors = {
        file: [Part(**{**part, "size": tuple(part["size"])}) for part in parts]
        for file, parts in said["tensors"].items()
    }
    files = {file: Fingerprint(**fingerprint) for file, fingerprint in said["files"].items()}
    return Manifest(**{**said, "tensors": tensors, "files": files})


def check(path: str | Path, manifest: Manifest, files: Sequence[str] | None = None) -> None:
    """Refuse an export of which a file isn't what was written; ``files``: those whose content is read, all without
    it."""
    folder = place(path)
    with _reading(path):
        there = files_in(folder)
        for name, expected in manifest.files.items():
            if name not in there:
                raise _damaged(path, f"{name} is missing")
            if (size := there[name]) != expected.bytes:
                raise _damaged(path, f"{name} has {size:,} bytes, not {expected.bytes:,}")
        for name in manifest.files if files is None else files:
            if fingerprint(folder / name) != manifest.files[name]:
                raise _damaged(path, f"{name} is not what was written")


def load(path: str | Path, model: Model, checkpoint_name: str = "last", world: Axis = Axis()) -> Cursor:
    """Fill ``model`` and its tables from the export at ``path``; returns where its run was.

    Of several processes (``world``) each reads the content of some files to check it: where one refuses, all must.
    """
    manifest = read_manifest(path)
    if checkpoint_name not in ("last", str(manifest.step)):
        raise UserError(
            f"export '{path}' is of step {manifest.step} and has no checkpoint '{checkpoint_name}': leave --checkpoint "
            "out, or choose one of the run itself"
        )
    check_noted(f"export '{path}'", asdict(manifest), model)
    check(path, manifest, list(manifest.files)[world.rank :: world.size])
    wanted = parameters(model) | mappings_of(model)
    sizes = {f"model/{name}": size for name, size in manifest.sizes.items()} | manifest.vocabularies
    checkpoint.check_tensors(f"export '{path}'", sizes, wanted, model)
    with _reading(path), TensorReader(place(path), manifest.tensors) as reader:
        for name, tensor in wanted.items():
            for offsets, values in held_parts(tensor).items():
                reader.read_into(name.removeprefix("model/"), offsets, values)
    return Cursor(manifest.generation, epoch=manifest.epoch, step=manifest.step)


def fingerprint(file: AnyPath) -> Fingerprint:
    """A file's bytes and their SHA-256, of which as much is in memory as is read at a time."""
    with file.open("rb") as content:
        return Fingerprint(file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())


def _digest(said: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in said.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _names(path: str | Path) -> set[str]:
    with _reading(path):
        return set(files_in(place(path)))


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Around what reads there: a disk or store that doesn't answer says nothing of the export."""
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, "a file of it went while it was read") from None
    except OSError as error:
        fix = remedy(error, "see to the disk or the store, and run it again")
        raise UserError(f"cannot read '{path}' ({first_line(error)}): {fix}") from None


def _damaged(path: str | Path, how: str) -> UserError:
    return UserError(f"export '{path}' is damaged ({how}): copy it again, or export the run again")
