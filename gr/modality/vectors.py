"""Files of items' vectors: Parquet with a column ``item_id`` and a column ``vector`` of equally long lists.

Shapes: n rows of a file, I items of a catalogue, E width of a vector, D of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gr.errors import UserError, first_line

AT_ONCE = 1 << 14
"""Rows of a file that are read at a time."""


def as_table(item_ids: pa.Array, vectors_nE: Tensor) -> pa.Table:
    """``item_id``, ``vector`` (a fixed-size list of float32)."""
    flat = pa.array(vectors_nE.float().cpu().contiguous().flatten().numpy())
    return pa.table(
        {"item_id": item_ids, "vector": pa.FixedSizeListArray.from_arrays(flat, vectors_nE.shape[1])}
    )


def of_table(table: pa.Table, what: str) -> Tensor:
    """(n, E) float32: the column ``vector``; ``what``: what people call the table."""
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    kinds = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    lists = any(is_kind(column.type) for is_kind in kinds)
    if not lists or not pa.types.is_floating(column.type.value_type):
        raise UserError(
            f"column vector of {what} is of type {column.type}: write lists of floats, all of one length"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold is refused below
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if column.null_count or not len(column) or len(flat) % len(column) or not _even(column):
        raise UserError(_not_even(what))
    if not np.isfinite(flat).all():
        raise UserError(f"a vector of {what} has NaN or infinity: write them again")
    return torch.from_numpy(flat.reshape(len(column), -1))


def _not_even(what: str) -> str:
    return f"the vectors of {what} are not all there and of one length: write them again"


def _even(column: pa.Array) -> bool:
    if pa.types.is_fixed_size_list(column.type):
        return True
    lengths = pc.list_value_length(column)
    return pc.min(lengths).as_py() == pc.max(lengths).as_py() != 0


def read_file(path: str, item_ids: pa.Array) -> Tensor:
    """(I, E) float32: the vectors that the file at ``path``, or a URL of fsspec, has for ``item_ids`` (I raw ids), in
    their order; others that it has are passed over.  The file is gone through a piece at a time.  Refused are vectors
    that are all the same: all items would be one."""
    what = f"'{path}'"
    first_E, rows, alike = torch.empty(0), 0, True
    found_IE, counts_I = torch.empty(0, 0), np.zeros(len(item_ids), dtype=np.int64)
    with _opened(path) as parquet:
        for batch in parquet.iter_batches(AT_ONCE, columns=["item_id", "vector"]):
            piece = pa.Table.from_batches([batch])
            place_n = _places(piece["item_id"].combine_chunks(), item_ids, what)
            vectors_nE = of_table(piece, what)
            if not found_IE.numel():
                found_IE = torch.empty(len(item_ids), vectors_nE.shape[1])
            if vectors_nE.shape[1] != found_IE.shape[1]:
                raise UserError(_not_even(what))
            first_E = first_E if rows else vectors_nE[0].clone()
            rows, alike = rows + len(vectors_nE), alike and bool((vectors_nE == first_E).all())
            wanted_n = np.flatnonzero(place_n >= 0)
            found_IE[torch.from_numpy(place_n[wanted_n])] = vectors_nE[torch.from_numpy(wanted_n)]
            counts_I += np.bincount(place_n[wanted_n], minlength=len(counts_I))
    for count, said in ((0, "no vector"), (2, "several vectors")):
        wrong_I = counts_I >= count if count else counts_I == 0
        if wrong_I.any():
            raise UserError(
                f"{what} has {said} for {wrong_I.sum():,} of {len(item_ids):,} items "
                f"({item_ids[int(wrong_I.argmax())].as_py()!r} is the first): encode the catalogue again"
            )
    if alike and rows > 1:
        raise UserError(f"the vectors of {what} are all the same: encode the catalogue again")
    return found_IE


def width_of(path: str) -> int:
    """E of such a file, from its first row."""
    with _opened(path) as parquet:
        first = next(parquet.iter_batches(1, columns=["vector"]), None)
        if first is None:
            raise UserError(f"'{path}' has no vectors: write it with the program encode")
        return of_table(pa.Table.from_batches([first]), f"'{path}'").shape[1]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A file of item_id and vector, or a URL of one; a UserError for whatever goes wrong while it is read."""
    import fsspec

    what = f"'{path}'"
    try:
        system, where = fsspec.core.url_to_fs(path)
        if not system.isfile(where):
            raise UserError(f"no file {what} with vectors of items: write it with the program encode")
        with system.open(where, "rb") as file, pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if missing := [name for name in ("item_id", "vector") if name not in names]:
                raise UserError(f"{what} has no column {missing[0]}: write it with the program encode")
            yield parquet
    except UserError:
        raise
    except Exception as error:  # a store's own too, such as that it has no key to it
        raise UserError(
            f"{what} can't be read as a Parquet file of item_id and vector ({first_line(error)}): write it again with "
            "the program encode"
        ) from None


def _places(ids_n: pa.Array, item_ids: pa.Array, what: str) -> np.ndarray:
    """(n,) int64: which of ``item_ids`` each is, or -1."""
    if ids_n.type != item_ids.type:
        both_integers = pa.types.is_integer(ids_n.type) and pa.types.is_integer(item_ids.type)
        if not both_integers and not pa.types.is_string(item_ids.type):
            raise UserError(
                f"item_id of {what} is {ids_n.type}, and the catalogue's {item_ids.type}: write ids as the catalogue's "
                "are"
            )
        try:
            ids_n = ids_n.cast(item_ids.type)
        except pa.ArrowInvalid as error:  # an integer that is too large to be one of the catalogue's
            raise UserError(
                f"item_id of {what} can't be one of the catalogue's ({first_line(error)}): write ids as those are"
            ) from None
    place_n = pc.index_in(ids_n, value_set=item_ids)
    return pc.fill_null(place_n, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def projected(vectors_IE: Tensor, dim: int, std: float) -> Tensor:
    """(I, D) float32: the vectors on their D principal axes, of spread ``std`` over all numbers; for a table's first
    rows.  Where E is less than D the columns behind are zeros."""
    x_IE = vectors_IE.double()
    x_IE = x_IE - x_IE.mean(0)
    _, axes_EE = torch.linalg.eigh(x_IE.T @ x_IE)
    axes_ED = axes_EE.flip(1)[:, :dim]  # eigenvalues come in ascending order
    largest_D = axes_ED.gather(0, axes_ED.abs().argmax(0, keepdim=True))[0]
    y_ID = x_IE @ (axes_ED * torch.where(largest_D < 0, -1.0, 1.0))
    y_ID = y_ID * (std / y_ID.square().mean().sqrt().clamp_min(1e-12))
    return torch.nn.functional.pad(y_ID, (0, dim - y_ID.shape[1])).float()
