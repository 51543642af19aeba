"""What training may see, and what is counted of it once: how often each item occurs, who has targets.

I: catalogue size, R: users of a block.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr.data.columns import checksum
from gr.data.sequences import ITEM, Sequences
from gr.errors import UserError, first_line

if TYPE_CHECKING:
    from gr.data.dataset import SequenceDataset
    from gr.data.split import Split

log = logging.getLogger(__name__)

COUNTING = 1
"""Goes up when the same dataset and split would be counted otherwise."""

ROWS_AT_ONCE = 1 << 20  # of what was kept: an item's 8 bytes are not there twice


@dataclass(frozen=True)
class Counted:
    """Of a dataset under a split.

    counts_I: int64, training actions of each item.  users: users with a training example, by most splits an input and
    its target.  targets: held-out split -> users with a target in it.
    """

    counts_I: np.ndarray
    users: int
    targets: dict[str, int]


def training_sequences(
    dataset: SequenceDataset, split: Split, columns: Iterable[str] = ()
) -> Iterator[Sequences]:
    """The training users' sequences cut to the actions that training may see, block by block, in order.  ``columns``:
    those wanted beside ``item``."""
    blocks = range(-(-split.training_rows(dataset.users) // dataset.manifest.block_rows))
    for rows in dataset.read_blocks(blocks, {ITEM, *columns, *split.needs}):
        stop_R = _training_stops(dataset, split, rows)
        yield rows.take(np.flatnonzero(stop_R >= 0), stop=stop_R[stop_R >= 0])


def training_counts(dataset: SequenceDataset, split: Split) -> np.ndarray:
    """(I,) int64: how many training actions each item has."""
    return counted(dataset, split).counts_I


def counted(dataset: SequenceDataset, split: Split) -> Counted:
    """What :func:`count` finds, kept beside the dataset the first time, in ``counts/``.

    What is kept belongs to one generation and one split; what doesn't fit, or can't be read, is counted again, and a
    folder that can't be written to is left as it is.
    """
    about = {"counting": COUNTING, "generation": dataset.manifest.generation, "split": split.description}
    if dataset.filters:
        about["filters"] = [one.config.model_dump(mode="json") for one in dataset.filters]
    key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    file = f"counts/{key}.parquet"
    kept = _kept(dataset, file, about)
    if kept is not None:
        return kept
    found = count(dataset, split)
    table = pa.table({"count": found.counts_I})
    said = {**about, **asdict(found), "checksum": checksum(table["count"].combine_chunks())}
    del said["counts_I"]
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"gr": json.dumps(said)}), content, compression="zstd")
    try:
        dataset.folder.publish(file, content.getvalue())
    except OSError as error:
        log.info("what was counted is not kept in '%s' (%s)", dataset.folder.of(file), first_line(error))
    return found


def count(dataset: SequenceDataset, split: Split) -> Counted:
    """Reads the whole dataset, its items alone (and what the split looks at)."""
    counts = np.zeros(dataset.items, np.int64)
    users, targets = 0, dict.fromkeys(split.names, 0)
    blocks = range(len(dataset.manifest.blocks))
    for block, rows in zip(blocks, dataset.read_blocks(blocks, {ITEM, *split.needs})):
        if len(rows.items_A) and not 0 <= rows.items_A.min() <= rows.items_A.max() < dataset.items:
            raise UserError(
                f"block {block} of '{dataset.path}' has actions on items that its catalogue of {dataset.items} does "
                "not have: prepare the dataset again"
            )
        stop_R = _training_stops(dataset, split, rows)
        kept = rows.take(np.flatnonzero(stop_R >= 0), stop=stop_R[stop_R >= 0])
        counts += np.bincount(kept.items_A, minlength=dataset.items)
        users += int((stop_R >= split.least).sum())
        for name in split.names:
            targets[name] += int((split.target(rows, name, dataset.users) >= 0).sum())
    return Counted(counts, users, targets)


def _training_stops(dataset: SequenceDataset, split: Split, rows: Sequences) -> np.ndarray:
    """(R,) how many leading actions of each user train, -1 for users who don't take part."""
    return np.where(rows.ordinals_R < split.training_rows(dataset.users), split.train_stop(rows), -1)


def _kept(dataset: SequenceDataset, file: str, about: dict) -> Counted | None:
    try:
        with pq.ParquetFile(pa.BufferReader(dataset.folder.read(file))) as opened:
            said = json.loads((opened.schema_arrow.metadata or {})[b"gr"])
            fits = (
                {key: said[key] for key in about} == about
                and opened.metadata.num_rows == dataset.items
                and opened.schema_arrow.field("count").type == pa.int64()
            )
            if not fits:
                return None
            counts, first = np.empty(dataset.items, np.int64), 0
            for rows in opened.iter_batches(ROWS_AT_ONCE, columns=["count"]):
                counts[first : first + len(rows)] = rows["count"].to_numpy()
                first += len(rows)
        if checksum(pa.array(counts)) != said["checksum"]:
            return None
        return Counted(counts, int(said["users"]), dict(said["targets"]))
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        log.info(
            "'%s' is counted again, what was kept is no use (%s)", dataset.folder.of(file), first_line(error)
        )
        return None
