"""KuaiRand-Pure (Gao et al., CIKM 2022): impressions of short videos with what the user did at each.

The standard-policy log alone: in the random one videos were inserted, which is another distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from gr.data.dataset import SequenceDataset
from gr.data.making.described import catalogue_table, check_distinct
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.log import LogReader
from gr.data.making.prepare import prepare
from gr.data.making.quarantine import Quarantine
from gr.data.making.schema import Columns, FieldColumn, LogSchema, Preparation
from gr.data.making.sources.base import QUIET, Source
from gr.errors import UserError, first_line
from gr.progress import Progress

LABELS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
    "profile_enter": "is_profile_enter",
}
"""Field -> column of the log, which holds 0 or 1."""
OTHERS = {"play_time": "play_time_ms", "duration": "duration_ms", "tab": "tab"}
TYPES = {"tab": "string"}  # others are floats, so that what nobody knows is NaN
RANGES = [
    "user_active_degree",
    *(f"{of}_range" for of in ("follow_user_num", "fans_user_num", "friend_user_num")),
]
USERS = [*RANGES, "register_days_range", *(f"onehot_feat{number}" for number in range(18))]
VIDEOS = ["author_id", "video_type", "upload_type", "music_type", "video_duration"]
PUBLISHED = "give the file as it was published"
BEFORE = "history"
"""The part of the log that is each user's last videos before its first day."""


class KuaiRandPure(Source):
    """``--source``: a folder with ``log_standard*``, ``user_features*``, ``video_features_basic*`` (Parquet or CSV, as
    published) and perhaps ``user_history_before*``: of each user the last videos before the log, their order alone.

    Those become the user's first actions, at the time of the last of them, which is the only one known; what is known
    of them is whether they were liked and viewed long, the other labels are NaN.  A video that stands in a user's
    history several times, and only sometimes among those viewed long (liked), has NaN there too."""

    name = "kuairand-pure"

    class Options(Preparation):
        """history: whether the videos before the log become actions.  ``items``: as of MovieLens."""

        items: Any = "listed"
        history: bool = True

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        folder = _folder(source)
        stems = ("log_standard", "video_features_basic", "user_features")
        log, videos, users = (_file(folder, stem) for stem in stems)
        history = _file(folder, "user_history_before", needed=False) if self.options.history else None
        reader = Impressions(str(log), history)
        return prepare(
            reader,
            out,
            self.name,
            self.options,
            described=lambda integer: _videos(videos, integer),
            described_users=lambda integer: _users(users, integer),
            overwrite=overwrite,
            progress=progress,
            provenance={"source": source, "options": self.options.model_dump(mode="json")},
            engine=engine,
        )


class Impressions(LogReader):
    """The log's impressions, after those of ``history`` (a Parquet file, or None)."""

    def __init__(self, log: str, history: Path | None) -> None:
        fields: dict[str, FieldColumn | str] = {
            name: FieldColumn.model_validate({"column": column, "type": TYPES.get(name, "float")})
            for name, column in (LABELS | OTHERS).items()
        }
        columns = Columns(user="user_id", item="video_id", time="time_ms", fields=fields)
        super().__init__(
            log, LogSchema(columns=columns, time_unit="ms", user_ids="integer", item_ids="integer")
        )
        self.history = history
        self.before = self.after = True
        self.actions_before = 0
        self.estimated_rows += 0 if history is None else _listed(history)

    @cached_property
    def earlier(self) -> pa.Table | None:
        """The actions of the history."""
        return None if self.history is None else _history(self.history, self.table_schema)

    def tables(self, chunk_rows: int, quarantine: Quarantine) -> Iterator[pa.Table]:
        if self.before and (earlier := self.earlier) is not None:
            self.rows_read += earlier.num_rows
            self.actions_before += earlier.num_rows
            for first in range(0, earlier.num_rows, chunk_rows):
                yield earlier.slice(first, chunk_rows)
        for table in super().tables(chunk_rows, quarantine) if self.after else ():
            for name, column in LABELS.items():
                _check_label(table[f"field.{name}"], column, self.files[0].name)
            yield table

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "earlier"}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "actions_before": self.actions_before}

    def identity(self) -> Any:
        stat = None if self.history is None else self.history.stat()
        return [*super().identity(), None if stat is None else [stat.st_size, stat.st_mtime_ns]]

    def parts(self) -> Iterator[Any]:
        yield BEFORE
        yield from super().parts()

    def only(self, part: Any) -> LogReader:
        reader = super().only([] if part == BEFORE else part)
        assert isinstance(reader, Impressions)
        reader.before, reader.after, reader.actions_before = part == BEFORE, part != BEFORE, 0
        return reader

    def seen(self) -> dict[str, Any]:
        return {**super().seen(), "before": self.actions_before}

    def add_seen(self, seen: dict[str, Any]) -> None:
        super().add_seen(seen)
        self.actions_before += seen["before"]


def _check_label(column: pa.ChunkedArray, name: str, file: str) -> None:
    known = pc.or_(pc.equal(column, 0.0), pc.equal(column, 1.0))
    if not pc.all(known).as_py():
        value = column.filter(pc.invert(known))[0].as_py()
        raise UserError(
            f"'{file}', column '{name}': {value:g} is no label, which is 0 or 1: correct the row, or take another "
            "log"
        )


def _history(file: Path, schema: pa.Schema) -> pa.Table:
    """A row an action, in each user's order."""
    table = _read(file, ["user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq"])
    for name in ("watch_seq", "like_seq", "long_watch_seq"):
        kind = table[name].type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise UserError(f"'{file}', column '{name}': {kind} is no list: {PUBLISHED}")
    for name in table.column_names:
        _check_known(table[name], name, file)
    lists = table["watch_seq"].combine_chunks()
    items = _integers(lists.flatten(), "watch_seq", file)
    row_A = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    count = len(items)
    columns: dict[str, Any] = {
        "user": _integers(table["user_id"].combine_chunks(), "user_id", file).take(pa.array(row_A)),
        "item": items,
        "time": _integers(table["last_time_ms"].combine_chunks(), "last_time_ms", file).take(pa.array(row_A)),
    }
    known = {"field.long_view": "long_watch_seq", "field.like": "like_seq"}
    for field in schema:
        if field.name in columns:
            continue
        if field.name in known:
            of_label = known[field.name]
            chosen = table[of_label].combine_chunks()
            listed = _integers(chosen.flatten(), of_label, file).to_numpy()
            counts = pc.list_value_length(chosen).to_numpy(zero_copy_only=False)
            labels_A = _membership(row_A, items.to_numpy(), np.repeat(np.arange(len(chosen)), counts), listed)
            columns[field.name] = pa.array(labels_A)
        elif field.type == pa.string():
            columns[field.name] = pa.array([""] * count)
        else:
            columns[field.name] = pa.array(np.full(count, np.nan))
    return pa.table({field.name: columns[field.name] for field in schema}, schema=schema)


def _listed(file: Path) -> int:
    """Videos in all histories, as the file's footer says, or none where it doesn't."""
    if file.suffix != ".parquet":
        return 0
    try:
        footer = pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(file, error) from None
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(n) for group in groups for n in range(group.num_columns)]
    return sum(column.num_values for column in columns if column.path_in_schema.startswith("watch_seq."))


def _membership(
    row_A: np.ndarray, items_A: np.ndarray, row_L: np.ndarray, listed_L: np.ndarray
) -> np.ndarray:
    """(A,) 1 where an action's item is in its row's list, 0 where not, NaN where the item is in the row's actions more
    often than in the list.  row_L, listed_L: whose lists, and what is in them."""
    span = int(max(items_A.max(initial=0), listed_L.max(initial=0))) + 1
    keys_A, place_A, own_U = np.unique(row_A * span + items_A, return_inverse=True, return_counts=True)
    keys_L, found_L = np.unique(row_L * span + listed_L, return_counts=True)
    at_U = np.searchsorted(keys_L, keys_A)
    there_U = np.zeros(len(keys_A), np.int64)
    inside_U = at_U < len(keys_L)
    inside_U[inside_U] = keys_L[at_U[inside_U]] == keys_A[inside_U]
    there_U[inside_U] = found_L[at_U[inside_U]]
    labels_U = np.where(there_U == 0, 0.0, np.where(there_U >= own_U, 1.0, np.nan))
    return labels_U[place_A]


def _users(file: Path, integer_ids: bool) -> pa.Table:
    table = _read(file, ["user_id", *USERS])
    columns = {"user_id": table["user_id"].combine_chunks()}
    for name in USERS:
        column = table[name].combine_chunks()
        columns[name] = _integers(column, name, file) if pa.types.is_floating(column.type) else column
    found = catalogue_table(pa.table(columns), "user_id", integer_ids, str(file), "file of users")
    check_distinct(found, str(file), "user")
    return found.rename_columns(["user_id", *USERS])


def _videos(file: Path, integer_ids: bool) -> pa.Table:
    table = _read(file, ["video_id", *VIDEOS, "tag"])
    tags = [_tags(text, file) for text in table["tag"].to_pylist()]
    columns = {name: table[name].combine_chunks() for name in ("video_id", *VIDEOS)}
    columns["music_type"] = _integers(columns["music_type"], "music_type", file)
    columns["tag"] = pa.array(tags, pa.list_(pa.int64()))
    found = catalogue_table(pa.table(columns), "video_id", integer_ids, str(file))
    check_distinct(found, str(file), "item")
    return found


def _tags(text: Any, file: Path) -> list[int]:
    """The tags of a video: "39,2", one number, or nothing where they are unknown."""
    parts = [part.strip() for part in str("" if text is None else text).split(",")]
    if parts in ([""], ["unknown"]):
        return []
    if odd := [part for part in parts if not part.isdecimal()]:
        raise UserError(
            f"'{file}', column 'tag': {odd[0]!r} of {text!r} is no tag, which is an integer: {PUBLISHED}"
        )
    return [int(part) for part in parts]


def _integers(column: pa.Array, name: str, file: Path) -> pa.Array:
    try:
        return column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"'{file}', column '{name}': {first_line(error)}: {PUBLISHED}") from None


def _check_known(column: pa.ChunkedArray, name: str, file: Path) -> None:
    """Refuse a column of which a value, or one of a list, is missing."""
    lists = column.type.num_fields
    if column.null_count or (lists and any(chunk.flatten().null_count for chunk in column.chunks)):
        raise UserError(f"'{file}', column '{name}': a value is missing: {PUBLISHED}")


def _read(file: Path, columns: list[str]) -> pa.Table:
    """The columns, decoded, of a file that fits in memory."""
    try:
        if file.suffix == ".parquet":
            names = pq.read_schema(file).names
        else:
            found = pyarrow.csv.read_csv(file)
            names = found.column_names
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"'{file}' has no column '{missing[0]}': {PUBLISHED}")
        table = pq.read_table(file, columns=columns) if file.suffix == ".parquet" else found.select(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(file, error) from None
    return table


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"cannot read '{file}' ({first_line(error)}): fetch it again")


def _folder(source: str | None) -> Path:
    if source is None or not Path(source).is_dir():
        raise UserError(
            f"there is no folder {source!r}: get KuaiRand-Pure from https://kuairand.com, unpack it, and give --source "
            "the folder with log_standard*"
            if source is not None
            else "KuaiRand-Pure is fetched by hand: get it from https://kuairand.com, unpack it, and give --source the "
            "folder with log_standard*"
        )
    folder = Path(source)
    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return next((path for path in (folder, *below) if any(path.glob("log_standard*"))), folder)


def _file(folder: Path, stem: str, needed: bool = True) -> Any:
    """The one file of that name, Parquet or CSV; of the log all of them, as a pattern."""
    for ending in (".parquet", ".csv"):
        found = sorted(folder.glob(f"{stem}*{ending}"))
        if found and stem == "log_standard":
            return folder / f"{stem}*{ending}"
        if found:
            return found[0]
    if needed:
        raise UserError(
            f"'{folder}' has no {stem}*.parquet or .csv: give the folder of KuaiRand-Pure as it was published"
        )
    return None
