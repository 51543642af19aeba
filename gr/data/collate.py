"""Rows of a dataset -> SequenceBatch."""

from __future__ import annotations

import numpy as np
import torch

from gr.batch import SequenceBatch
from gr.data.sequences import Sequences


def collate(rows: Sequences) -> SequenceBatch:
    """The rows as they are, as CPU tensors (see :class:`gr.batch.SequenceBatch` for shapes and dtypes)."""

    def tensor(column: np.ndarray | None) -> torch.Tensor | None:
        return None if column is None else torch.from_numpy(column.astype(np.int64))

    return SequenceBatch(
        offsets_B1=torch.from_numpy(rows.offsets_R1.astype(np.int64)),
        items_T=torch.from_numpy(rows.items_A.astype(np.int64)),
        ordinals_B=torch.from_numpy(rows.ordinals_R.astype(np.int64)),
        lengths=tuple(rows.lengths_R.tolist()),
        timestamps_T=tensor(rows.timestamps_A),
        action_types_T=tensor(rows.action_types_A),
    )
