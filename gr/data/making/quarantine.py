"""What happens to bad rows: the first one ends the work, or all are written aside and counted."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import UserError

SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),
        ("column", pa.string()),
        ("reason", pa.string()),
        ("record", pa.string()),
    ]
)
PENDING_ROWS = 65536


@dataclass(frozen=True)
class BadRow:
    """``row`` counts from 0 in the row group (Parquet) or among the file's records (CSV: ``row_group`` None)."""

    file: str
    row_group: int | None
    row: int
    column: str | None
    reason: str
    record: str


class Quarantine:
    """Bad rows as Parquet: file, row group, row, column, reason, and the record's mapped columns as JSON."""

    def __init__(self, folder: Path | None):
        """``folder``: where to write; None: a bad row is an error."""
        self.folder = folder
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self._pending: list[BadRow] = []
        self._writer: pq.ParquetWriter | None = None

    @property
    def failing(self) -> bool:
        return self.folder is None

    def add(self, row: BadRow, kind: str) -> None:
        """``kind``: the reason without the value, for the counts."""
        self.rows += 1
        self.reasons[kind] += 1
        self._pending.append(row)
        if len(self._pending) >= PENDING_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = {name: [getattr(row, name) for row in self._pending] for name in SCHEMA.names}
        self._write(pa.table(columns, schema=SCHEMA))
        self._pending = []

    def _write(self, rows: pa.Table) -> None:
        assert self.folder is not None
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self.folder / "part-00000.parquet", SCHEMA)
        self._writer.write_table(rows)

    def absorb(self, folder: Path, rows: int, reasons: dict[str, int]) -> None:
        """Take in what another one, of a later part of the log, wrote in its ``folder``."""
        self.rows += rows
        self.reasons.update(reasons)
        for file in sorted(folder.glob("*.parquet")):
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(PENDING_ROWS):
                    self._write(pa.Table.from_batches([batch], SCHEMA))

    def close(self) -> None:
        if self._pending:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def publish(self, folder: Path) -> None:
        """Move what was written to ``folder``."""
        self.close()
        if self._writer is not None and self.folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(self.folder, folder)


def refuse(where: str, problem: str, fix: str) -> UserError:
    """The error for a bad row when the policy is ``fail``."""
    first = f"{fix}, " if fix else ""
    return UserError(
        f"{where}: {problem}; {first}correct it, or say on_bad_rows=quarantine to put such rows aside"
    )
