"""Small logs: written, prepared, and read back as what each user did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import SequenceDataset
from gr.data.making.sources.base import make_source
from gr.errors import UserError
from gr.progress import Progress

COLUMNS = {"user": "u", "item": "i", "time": "t"}
NOW = 1_700_000_000  # 2023-11-14 22:13:20
ASIDE = "correct it, or say on_bad_rows=quarantine to put such rows aside"


class Notes(Progress):
    """Remembers what was said, and how far the work was."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Made:
    dataset: SequenceDataset
    said: list[str]

    @property
    def rows(self) -> dict[Any, list[tuple[Any, ...]]]:
        """user -> [(raw item id, time if there is one)]."""
        ids = self.dataset.catalogue["item_id"].to_pylist()
        items = {user: [ids[i] for i in rows] for user, rows in self.column("item").items()}
        if not self.dataset.has_timestamps:
            return {user: [(i,) for i in rows] for user, rows in items.items()}
        times = self.column("time")
        return {user: list(zip(rows, times[user])) for user, rows in items.items()}

    def column(self, name: str) -> dict[Any, list[Any]]:
        """user -> the values of a column, in the order of the actions."""
        rows = self.dataset.read_rows(0, self.dataset.users)
        bounds = zip(rows.offsets_R1, rows.offsets_R1[1:])
        return {u: rows.columns[name][a:b].tolist() for u, (a, b) in zip(rows.users_R.tolist(), bounds)}

    @property
    def facts(self) -> dict[str, Any]:
        """The provenance, as the file has it."""
        return json.loads((self.dataset.path / "manifest.json").read_text())["provenance"]

    @property
    def quarantined(self) -> dict[str, int]:
        return self.facts["quarantined"]


def write(folder: Path, name: str = "log.parquet", *, int96: bool = False, **columns: Any) -> Path:
    """A Parquet file; columns not given are a user 1, items 1, 2, ... and times."""
    rows = len(next(c for c in columns.values() if c is not None))
    whole = {"u": [1] * rows, "i": list(range(1, rows + 1)), "t": [NOW + n for n in range(rows)]} | columns
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({k: v for k, v in whole.items() if v is not None})
    pq.write_table(table, path, use_deprecated_int96_timestamps=int96)
    return path


def write_text(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def make(source: Path | str, out: Path, **schema: Any) -> Made:
    notes = Notes()
    options = {"columns": COLUMNS, **schema}
    dataset = make_source("log", options).prepare(str(source), str(out), overwrite=True, progress=notes)
    return Made(dataset, notes.said)


def refusal(source: Path | str, out: Path, **schema: Any) -> str:
    with pytest.raises(UserError) as error:
        make(source, out, **schema)
    assert not out.exists()
    return str(error.value)
