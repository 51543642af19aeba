"""Catalogue: the items of a dataset, row by row.  I: catalogue size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import column_digest
from gr.data.folder import first_line
from gr.errors import UserError, nearest

if TYPE_CHECKING:
    from gr.data.dataset import SequenceDataset
    from gr.data.manifest import Manifest

CATALOGUE = "catalogue.parquet"


class Catalogue:
    """Rows, raw ids, columns; each column is read, and checked against the manifest, when it is first asked for."""

    def __init__(self, dataset: SequenceDataset):
        self._folder, self._manifest = dataset.folder, dataset.manifest
        self._read: dict[str, pa.ChunkedArray] = {}

    @property
    def num_rows(self) -> int:
        """I."""
        return self._manifest.items

    def __len__(self) -> int:
        return self.num_rows

    @property
    def manifest(self) -> Manifest:
        """What the dataset says of itself."""
        return self._manifest

    @property
    def column_names(self) -> list[str]:
        return list(self._manifest.catalogue)

    @property
    def ids(self) -> pa.Array:
        """(I,) raw item ids, int64 or string."""
        return self["item_id"].combine_chunks()

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.column(name)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column in row order: ``item_id``, ``count`` (actions in the log), or one that was prepared with them."""
        if name not in self._manifest.catalogue:
            raise UserError(
                f"'{self._file}' has no column '{name}': {nearest(name, self._manifest.catalogue)}"
            )
        if name not in self._read:
            self._read.update(self._columns([name]))
        return self._read[name]

    def to_table(self, names: Iterable[str] | None = None) -> pa.Table:
        """The columns ``names``, all without it."""
        wanted = self.column_names if names is None else list(names)
        return pa.table({name: self.column(name) for name in wanted})

    def to_pydict(self) -> dict[str, list]:
        return self.to_table().to_pydict()

    def check_footer(self) -> None:
        """Refuse a file that has not the manifest's rows and columns; reads the footer alone."""
        try:
            with self._folder.opened(CATALOGUE) as source:
                footer = pq.read_metadata(source)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        if footer.num_rows != self._manifest.items:
            raise self._changed(f"has {footer.num_rows} rows, the manifest says {self._manifest.items}")
        names = footer.schema.to_arrow_schema().names
        if missing := [name for name in self._manifest.catalogue if name not in names]:
            raise self._changed(f"has no column '{missing[0]}', the manifest says it has")

    @property
    def _file(self) -> str:
        return self._folder.of(CATALOGUE)

    def _columns(self, names: list[str]) -> dict[str, pa.ChunkedArray]:
        try:
            with self._folder.opened(CATALOGUE) as source, pq.ParquetFile(source) as parquet:
                table = parquet.read(columns=names)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        for name in names:
            if name not in table.column_names:
                raise self._changed(f"has no column '{name}', the manifest says it has")
            if column_digest(table[name].combine_chunks()) != self._manifest.catalogue[name]:
                raise self._changed(f"does not hold in column '{name}' what was written there (its digest differs)")
        return {name: table[name] for name in names}

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"cannot read '{self._file}' ({first_line(error)}): prepare the dataset again")

    def _changed(self, how: str) -> UserError:
        return UserError(
            f"'{self._file}' {how}: the files were changed after preparing; prepare the dataset again"
        )
