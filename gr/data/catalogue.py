"""Catalogue: the items of a dataset, row by row, and what training has of them.  I: catalogue size."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr.batch import Jagged
from gr.data.columns import ColumnInfo, checksum
from gr.data.popularity import Counted, counted
from gr.data.stores import remedy
from gr.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from gr.data.dataset import SequenceDataset
    from gr.data.manifest import Manifest
    from gr.data.split import Split
    from gr.processes import Processes


log = logging.getLogger(__name__)


def _checksums(table: pa.Table) -> dict[str, str]:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    # of vectors, all of one length, the numbers
    flat = {n: c.flatten() if pa.types.is_fixed_size_list(c.type) else c for n, c in columns.items()}
    return {name: checksum(column) for name, column in flat.items()}


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


class Catalogue:
    """Rows, raw ids, columns, and under a split the training counts; all of it is read, checked or counted when it is
    first asked for."""

    def __init__(self, dataset: SequenceDataset, split: Split | None = None):
        self._dataset, self._split = dataset, split
        self._folder, self._manifest = dataset.folder, dataset.manifest
        self._read: dict[str, pa.ChunkedArray] = {}
        self._counted: Counted | None = None
        self._footer: pq.FileMetaData | None = None

    def under(self, split: Split) -> Catalogue:
        """The same items, counted under ``split``."""
        other = Catalogue(self._dataset, split)
        other._read, other._footer = self._read, self._footer
        return other

    @property
    def counted(self) -> Counted:
        """What is counted under the split: read from beside the dataset, or counted now and kept there."""
        if self._counted is None:
            if self._split is None:
                raise ValueError("training counts hang on a split: ask catalogue.under(split)")
            self._counted = counted(self._dataset, self._split)
        return self._counted

    @property
    def training_counts(self) -> Tensor:
        """(I,) int64: how many training actions each item has."""
        import torch

        return torch.from_numpy(self.counted.counts_I)

    def count_once(self, processes: Processes) -> Counted:
        """:attr:`counted`, by the main process for all: the dataset is read at most once.  Every process calls this;
        where the main one refuses, all do."""
        mine = processes.together(lambda: self.counted if processes.is_main else None)
        self._counted = processes.broadcast(mine)
        return self.counted

    @property
    def rows(self) -> int:
        """I."""
        return self._manifest.items

    num_rows = rows

    def __len__(self) -> int:
        return self.rows

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

    def info(self, name: str) -> ColumnInfo:
        """What a column holds; ``multi``: lists, or nothing for some item."""
        column = self.column(name)
        kind, lists = column.type, _is_list(column.type)
        kind = kind.value_type if lists else kind
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        named = (
            "string" if text else "int64" if whole else "float64" if pa.types.is_floating(kind) else str(kind)
        )
        return ColumnInfo(name, named, "items", lists or column.null_count > 0)

    def codes(self, name: str) -> Tensor | Jagged:
        """A column of integers or texts as features look it up: I values, int64, of texts their 64-bit hashes; I lists
        where there are lists, or where some items have nothing: these have empty ones."""
        from gr.data.collate import tensor

        info, array = self.info(name), self.column(name).combine_chunks()
        item_V, values = np.arange(len(array)), array
        if _is_list(array.type):
            item_V, values = pc.list_parent_indices(array).to_numpy(), pc.list_flatten(array)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        try:
            values = values.cast(pa.string() if info.type == "string" else pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(
                f"column '{name}' of '{self._file}' can't be looked up ({first_line(error)}): choose another one"
            ) from None
        counts_I = np.bincount(item_V[values.is_valid().to_numpy(zero_copy_only=False)], minlength=self.rows)
        found = values.drop_null().to_numpy(zero_copy_only=False)
        if not info.multi:
            return tensor(found)
        return tensor(Jagged(np.concatenate([[0], counts_I.cumsum()]), found))

    def numbers(self, name: str) -> Tensor:
        """(I,) float32 of a column of numbers, NaN where an item has none."""
        import torch

        array = self.column(name).combine_chunks()
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            raise UserError(
                f"column '{name}' of '{self._file}' is of type {array.type}, and a number is wanted: choose another one"
            )
        return torch.from_numpy(array.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32))

    def kept(self, kind: str, about: dict[str, Any]) -> pa.Table | None:
        """What :meth:`keep` was given for these items under the description ``about`` (JSON), if it is still whole."""
        file, said = self._kept_as(kind, about)
        try:
            table = pq.read_table(pa.BufferReader(self._folder.read(file)))
            found = json.loads((table.schema.metadata or {})[b"gr"])
            whole = found["about"] == said and found["checksums"] == _checksums(table)
            return table if whole and len(table) == self.rows else None
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            log.info("'%s' is made again (%s)", self._folder.of(file), first_line(error))
            return None

    def keep(self, kind: str, about: dict[str, Any], table: pa.Table) -> None:
        """Keep ``table``, a row an item, beside the dataset in ``kind``/; where nothing can be written, nothing is."""
        file, said = self._kept_as(kind, about)
        note = json.dumps({"about": said, "checksums": _checksums(table)})
        content = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"gr": note}), content, compression="zstd")
        try:
            self._folder.publish(file, content.getvalue())
        except OSError as error:
            log.info("what was computed is not kept in '%s' (%s)", self._folder.of(file), first_line(error))

    def _kept_as(self, kind: str, about: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        said = {"generation": self._manifest.generation, **about}
        key = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()
        return f"{kind}/{key}.parquet", said

    def to_table(self, names: Iterable[str] | None = None) -> pa.Table:
        """The columns ``names``, all without it."""
        wanted = self.column_names if names is None else list(names)
        return pa.table({name: self.column(name) for name in wanted})

    def to_pydict(self) -> dict[str, list]:
        return self.to_table().to_pydict()

    def check_footer(self) -> None:
        """Refuse a file that has not the manifest's rows and columns; reads the footer alone."""
        try:
            with self._folder.parquet(self._manifest.catalogue_file) as parquet:
                footer = self._footer = parquet.metadata
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        if footer.num_rows != self._manifest.items:
            raise self._changed(f"has {footer.num_rows} rows, the manifest says {self._manifest.items}")
        names = footer.schema.to_arrow_schema().names
        if missing := [name for name in self._manifest.catalogue if name not in names]:
            raise self._changed(f"has no column '{missing[0]}', the manifest says it has")

    @property
    def _file(self) -> str:
        return self._folder.of(self._manifest.catalogue_file)

    def _columns(self, names: list[str]) -> dict[str, pa.ChunkedArray]:
        try:
            with self._folder.parquet(self._manifest.catalogue_file, self._footer, columns=names) as parquet:
                table = parquet.read(columns=names)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        for name in names:
            if name not in table.column_names:
                raise self._changed(f"has no column '{name}', the manifest says it has")
            if checksum(table[name].combine_chunks()) != self._manifest.catalogue[name]:
                raise self._changed(
                    f"does not hold in column '{name}' what was written there (its checksum differs)"
                )
        return {name: table[name] for name in names}

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot read '{self._file}' ({first_line(error)}): {remedy(error, 'prepare the dataset again')}"
        )

    def _changed(self, how: str) -> UserError:
        return UserError(
            f"'{self._file}' {how}: the files were changed after preparing; prepare the dataset again"
        )
