"""What training may see: its sequences, and how often each item occurs in them.  I: catalogue size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from gr.data.dataset import SequenceDataset
from gr.data.sequences import ITEM, Sequences
from gr.data.split import Split


def training_sequences(
    dataset: SequenceDataset, split: Split, columns: Iterable[str] = ()
) -> Iterator[Sequences]:
    """The training users' sequences cut to the actions that training may see, block by block, in order.  ``columns``:
    those wanted beside ``item``."""
    left = split.training_rows(dataset.users)
    for block in range(len(dataset.manifest.blocks)):
        if left <= 0:
            return
        rows = dataset.read_block(block, {ITEM, *columns, *split.needs})
        stop_R = split.train_stop(rows)[:left]
        left -= len(rows)
        yield rows.take(np.arange(len(stop_R)), stop=stop_R)


def training_counts(dataset: SequenceDataset, split: Split) -> np.ndarray:
    """(I,) int64: how many training actions each item has."""
    counts = np.zeros(dataset.items, np.int64)
    for rows in training_sequences(dataset, split):
        counts += np.bincount(rows.items_A, minlength=dataset.items)
    return counts
