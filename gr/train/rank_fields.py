"""Requests to a pre-ranking model: what it knows of the user stands in the request itself, in the columns of the log.

Each candidate is judged as an impression of an evaluation is, by the same function.  Shapes: R requests, C candidates.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gr.batch import SequenceBatch
from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.models.two_tower.model import TwoTower
from gr.train.item_heads import item_columns
from gr.train.runs import OpenRun

AT_ONCE = 8192
"""Candidates that are computed at a time."""


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
        numbers = pa.types.is_integer(kind) or (pa.types.is_floating(kind) and info.type.startswith("float"))
        if not numbers:
            raise UserError(
                f"column '{column}' of '{name}' is of type {kind}, and the dataset's holds {info.type}: give values of "
                "that type"
            )
    return wanted


def scores(
    run: OpenRun, model: TwoTower, table: pa.Table, name: str, items_C: np.ndarray, owners_C: np.ndarray
) -> np.ndarray:
    """(C, 1) probabilities of candidates (rows of the catalogue) of the table's requests ``owners_C``."""
    of_items = item_columns(model, run.data.catalogue)
    of_users: dict[str, Tensor] = {}
    for column in model.user.needs:
        values = table[column].combine_chunks()
        if values.null_count:
            raise UserError(f"'{name}' has a request without '{column}': fill it in")
        of_users[column] = torch.from_numpy(
            values.to_numpy(zero_copy_only=False).astype(run.data.dataset.column(column).type)
        )
    found = [np.empty((0, 1), np.float32)]
    for start in range(0, len(items_C), AT_ONCE):
        items, owners = (torch.from_numpy(some[start : start + AT_ONCE]) for some in (items_C, owners_C))
        batch = _impressions(model, items, owners, of_users, of_items)
        found.append(model.logits(batch.to(model.device)).sigmoid().cpu().numpy())
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
