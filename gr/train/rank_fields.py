"""Requests to a pre-ranking model: what it knows of the user stands in the request itself, in the columns of the log.

Each candidate is judged as an impression of an evaluation is, by the same function.  Shapes: R requests, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.data.dataset import SequenceDataset
from gr.data.making.convert import as_written, can_be_ids, is_text, plain
from gr.errors import UserError, first_line
from gr.models.two_tower.model import TwoTower
from gr.train.item_heads import item_columns
from gr.train.runs import OpenRun


def check_columns(model: TwoTower, dataset: SequenceDataset, schema: pa.Schema, name: str) -> list[str]:
    """The columns of requests that the model reads; refuses a file without one, or that holds something else there."""
    wanted = sorted(model.user.needs)
    for column in wanted:
        if column not in schema.names:
            raise UserError(
                f"'{name}' has no column '{column}' (it has {', '.join(schema.names)}), and the run's model knows "
                f"'{column}' of a user: add it"
            )
        kind, info = schema.field(column).type, dataset.column(column)
        if info.multi:
            raise UserError(f"column '{column}' of requests holds lists, which isn't supported: leave it out")
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise _of_another_type(column, name, kind, info.type)
    return wanted


def values_of(table: pa.Table, column: str, kind: str, name: str) -> np.ndarray:
    """(R,) a column of requests as the dataset's type ``kind`` has it, its values unchanged (but for the digits that a
    float of that type hasn't); refused where one is missing, or is no such value."""
    given = table[column].combine_chunks()
    if given.null_count:
        raise UserError(f"'{name}' has a request without '{column}': fill it in")
    text, numeric = kind == "string", pa.types.is_integer(given.type) or pa.types.is_floating(given.type)
    try:
        if kind.startswith("float") and numeric:
            with np.errstate(over="ignore"):  # an infinite number is refused where it is read
                return given.to_numpy(zero_copy_only=False).astype(kind)
        found = _cast(given, pa.string() if text else pa.from_numpy_dtype(np.dtype(kind)))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _of_another_type(column, name, f"{given.type} ({first_line(error)})", kind) from None
    return found.to_numpy(zero_copy_only=False)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Numbers and text as values of another type; raises Arrow's error for a value that isn't one of that type, and for
    columns of anything else (dates, times, booleans, lists)."""
    if not (can_be_ids(values.type) or pa.types.is_null(values.type)):
        raise pa.ArrowInvalid("neither a number nor text")
    if is_text(values.type) and pa.types.is_integer(kind):  # of which a cast makes 7 of 007, and 31 of 0x1F
        if (written := as_written(plain(values))) is None:
            raise pa.ArrowInvalid("text that isn't an integer as it is written")
        values = written
    return values.cast(kind)


def _of_another_type(column: str, name: str, given: pa.DataType | str, kind: str) -> UserError:
    return UserError(
        f"column '{column}' of '{name}' is of type {given}, and the dataset's holds {kind}: give values of that type"
    )


def scores(
    run: OpenRun,
    model: TwoTower,
    table: pa.Table,
    name: str,
    items_C: np.ndarray,
    owners_C: np.ndarray,
    at_once: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """(C, 1) probabilities of candidates (rows of the catalogue) of the table's requests ``owners_C``, so many at a
    time, of which ``advance`` is told."""
    of_items = item_columns(model, run.data.catalogue)
    of_users: dict[str, Tensor] = {}
    for column in model.user.needs:
        values_R = values_of(table, column, run.data.dataset.column(column).type, name)
        if column in model.user.numbers and not np.isfinite(values_R).all():
            worst = values_R[~np.isfinite(values_R)][0]
            raise UserError(
                f"column '{column}' of '{name}' holds {worst} (model.user.numbers), which no network can read: give a "
                "finite number, or leave the request out"
            )
        of_users[column] = torch.tensor(values_R)
    found = [np.empty((0, 1), np.float32)]
    for start in range(0, len(items_C), at_once):
        items, owners = (torch.from_numpy(some[start : start + at_once]) for some in (items_C, owners_C))
        batch = _impressions(model, items, owners, of_users, of_items)
        found.append(model.logits(batch.to(model.device)).sigmoid().cpu().numpy())
        advance(len(items))
    return np.concatenate(found)


def _impressions(
    model: TwoTower,
    items_C: Tensor,
    owners_C: Tensor,
    of_users: dict[str, Tensor],
    of_items: dict[str, Tensor],
) -> SequenceBatch:
    """A row an impression, none of whose labels is known."""
    count = len(items_C)
    known = {name: values[owners_C] for name, values in of_users.items()}
    known |= {name: values[items_C] for name, values in of_items.items()}
    of_rows = (
        {f.column for f in model.user.fields if f.of == "users"} | model.user.of_users | model.item.of_users
    )
    labels = {name: torch.zeros(count) for name in model.labels.columns}
    return SequenceBatch(
        torch.arange(count + 1),
        torch.arange(count),
        (1,) * count,
        {"item": items_C, **labels, **{n: c for n, c in known.items() if n not in of_rows}},
        {n: c for n, c in known.items() if n in of_rows},
    )
