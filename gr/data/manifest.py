"""manifest.json: what a sequence dataset says of itself, and the checks that it is true."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gr.data.columns import TYPES, ColumnInfo
from gr.data.folder import Folder
from gr.data.sequences import ITEM, TIME, USER_ID
from gr.data.stores import remedy
from gr.errors import UserError, first_line

SCHEMA_VERSION = 2
BLOCKS_PER_FILE = 256
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Block:
    """One row group: the unit of reading and of shuffling.

    digest: of all of it (:func:`gr.data.columns.block_digest`).  columns: name -> checksum of that column.
    first_hash: hash64 of its first user's id, where rows are stored in that order, so that a user is found without
    reading all ids; else None.
    """

    file: str
    row_group: int
    rows: int
    actions: int
    digest: str
    columns: dict[str, str]
    first_hash: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.  ``provenance``: free for people, as is ``name``.

    columns: of actions and of users.  first_time, last_time: of all actions, seconds; None without times.
    catalogue: column -> checksum of it.
    fingerprint: of the sequences; the order of training hangs on it.  generation: of the sequences and the raw ids
    that the item rows stand for; a run goes on with the generation that it began with, or with one grown from it.
    earlier: the generations that this one has grown from by appending, oldest first; item rows mean the same in all.
    digest: of all this but ``name`` and ``provenance``.
    """

    name: str
    schema_version: int
    row_order: str
    block_rows: int
    users: int
    items: int
    actions: int
    columns: list[ColumnInfo]
    first_time: int | None
    last_time: int | None
    action_type_names: list[str]
    catalogue: dict[str, str]
    fingerprint: str
    generation: str
    blocks: list[Block]
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)
    earlier: list[str] = field(default_factory=list)

    @property
    def rows_are(self) -> str:
        """What a row is, as people call it: "impressions" where each is a single action and they stand in an order of
        their own, else "users"."""
        return "impressions" if self.row_order == "stream" and self.users == self.actions else "users"

    @property
    def counts(self) -> str:
        """How much there is, as people read it."""
        rows = f"{self.users:,} {self.rows_are}, {self.items:,} items"
        return rows if self.rows_are == "impressions" else f"{rows}, {self.actions:,} actions"

    @property
    def sequences_folder(self) -> str:
        return f"sequences{suffix(len(self.earlier))}"

    @property
    def catalogue_file(self) -> str:
        return f"catalogue{suffix(len(self.earlier))}.parquet"


_PARSER = TypeAdapter(Manifest)


def read_manifest(folder: Folder, name: str = MANIFEST) -> Manifest:
    """The manifest of the sequence dataset in ``folder``; a UserError where there is none that this gr can read, or
    where it isn't what gr wrote.  ``name``: of the file, for the manifest of an earlier generation."""
    file = folder.of(name)
    try:
        text = folder.read(name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no sequence dataset at '{folder.name}' (manifest.json is missing): "
            "make one with python -m gr prepare, or set data.path to one"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read '{file}' ({first_line(error)}): {remedy(error, 'check the path and its access')}"
        ) from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"'{file}' is damaged, it is not JSON ({first_line(error)}): prepare the dataset again"
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"'{file}' is not a manifest that gr wrote: prepare the dataset again")
    if difference := _difference_from_ours(raw):
        raise UserError(
            f"the dataset at '{folder.name}' was prepared by another version of gr (manifest.json: {difference}): "
            "prepare it again"
        )
    try:
        manifest = _PARSER.validate_json(text, strict=True)
        problem = _contradiction(manifest)
        if not problem and manifest.digest != content_digest(raw):
            problem = "it was changed after preparing"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"'{where}': {first['msg'][0].lower()}{first['msg'][1:]}" if where else first["msg"]
    if problem:
        raise UserError(f"'{file}' is damaged ({problem}): prepare the dataset again")
    return manifest


def to_json(manifest: Manifest) -> str:
    """The text of manifest.json; its ``digest`` is made here."""
    raw = asdict(manifest)
    return json.dumps({**raw, "digest": content_digest(raw)}, indent=1) + "\n"


def content_digest(raw: dict[str, Any]) -> str:
    """What ``digest`` has to be, from a manifest's keys and values."""
    content = {key: value for key, value in raw.items() if key not in ("name", "provenance", "digest")}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def fingerprint(
    row_order: str, block_rows: int, items: int, digests: Iterable[str], ids: Iterable[Sequence] | None = None
) -> str:
    """Digest of the sequences, or with the raw item ``ids`` in row order, some at a time, of the generation."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (row_order, block_rows, items, *digests):
        digest.update(f"{part};".encode())
    for number, some in enumerate(ids or ()):
        digest.update(("\n" * bool(number) + "\n".join(map(str, some))).encode())
    return digest.hexdigest()


def place(block: int, earlier: int = 0) -> tuple[str, int]:
    """File and row group of a block of a generation that has ``earlier`` ones."""
    number, row_group = divmod(block, BLOCKS_PER_FILE)
    return f"sequences{suffix(earlier)}/part-{number:05d}.parquet", row_group


def suffix(earlier: int) -> str:
    """What the names of a generation's files have in front of their ending: nothing for the first one."""
    return f"-{earlier}" if earlier else ""


def _difference_from_ours(raw: dict[str, Any]) -> str:
    """What sets a manifest's keys apart from those of this version, "" when nothing does."""
    version = raw.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        return f"schema version {version}, where this gr reads {SCHEMA_VERSION}"
    if difference := _difference_in_keys(Manifest, raw):
        return difference
    for name, kind in (("columns", ColumnInfo), ("blocks", Block)):
        if not isinstance(raw[name], list):
            return f"'{name}' is no list"
        for number, entry in enumerate(raw[name]):
            what = _difference_in_keys(kind, entry) if isinstance(entry, dict) else "no table of keys"
            if what:
                return f"{name.removesuffix('s')} {number}: {what}"
    return ""


def _difference_in_keys(kind: type, raw: dict[str, Any]) -> str:
    known, needed = _keys(kind)
    if raw.keys() == known.keys():
        return ""
    missing = [name for name in needed if name not in raw]
    unknown = [name for name in raw if name not in known]
    parts = (("missing", missing), ("unknown", unknown))
    return ", ".join(f"{what} {', '.join(map(repr, names))}" for what, names in parts if names)


@cache
def _keys(kind: type) -> tuple[dict[str, Any], list[str]]:
    """All keys (in a dictionary), and those that must be there."""
    known = {f.name: f for f in fields(kind)}
    return known, [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]


def _contradiction(manifest: Manifest) -> str:
    """What can't be true of a dataset that gr wrote, "" when nothing is found.  Nothing but the manifest is read."""
    blocks = manifest.blocks
    if manifest.row_order not in ("hash", "stream"):
        return f"row_order is {manifest.row_order!r}, not hash or stream"
    if manifest.block_rows < 1 or manifest.items < 1 or not blocks:
        return "it has no blocks, no items or blocks of no rows"
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        if (block.file, block.row_group) != place(number, len(manifest.earlier)):
            return f"block {number} is said to be row group {block.row_group} of '{block.file}'"
        if not 1 <= block.rows <= manifest.block_rows or (block.rows != manifest.block_rows and not last):
            return f"block {number} has {block.rows} rows where a block has {manifest.block_rows}"
        if block.actions < 0:
            return f"block {number} has {block.actions} actions"
    for what, counted in (
        ("users", sum(b.rows for b in blocks)),
        ("actions", sum(b.actions for b in blocks)),
    ):
        if getattr(manifest, what) != counted:
            return f"it says {getattr(manifest, what)} {what} and its blocks have {counted}"
    return _contradiction_in_columns(manifest) or _contradiction_in_digests(manifest)


def _contradiction_in_columns(manifest: Manifest) -> str:
    columns = {info.name: info for info in manifest.columns}
    if len(columns) != len(manifest.columns):
        return "two columns have the same name"
    if wrong := [c.name for c in manifest.columns if c.type not in TYPES or c.of not in ("actions", "users")]:
        return f"column '{wrong[0]}' is of an unknown type"
    for name, of in ((ITEM, "actions"), (USER_ID, "users")):
        if name not in columns or columns[name].of != of or columns[name].multi:
            return f"there is no column '{name}' of {of}"
    times = [time for time in (manifest.first_time, manifest.last_time) if time is not None]
    if len(times) != (2 if TIME in columns and manifest.actions else 0) or times != sorted(times):
        return f"first_time {manifest.first_time} and last_time {manifest.last_time} can't be those of its actions"
    for number, block in enumerate(manifest.blocks):
        if block.columns.keys() != columns.keys():
            return f"block {number} has checksums of other columns"
    return ""


def _contradiction_in_digests(manifest: Manifest) -> str:
    blocks = manifest.blocks
    if wrong := [n for n, b in enumerate(blocks) if not re.fullmatch("[0-9a-f]{32}", b.digest)]:
        return f"the digest of block {wrong[0]} is not one"
    hashes = [b.first_hash for b in blocks if b.first_hash is not None]
    if hashes and (
        len(hashes) < len(blocks) or hashes != sorted(hashes) or not 0 <= hashes[0] <= hashes[-1] < 2**64
    ):
        return "the first hashes of its blocks are not in order"
    made = fingerprint(manifest.row_order, manifest.block_rows, manifest.items, (b.digest for b in blocks))
    if manifest.fingerprint != made:
        return "its fingerprint is not that of its blocks"
    return ""
