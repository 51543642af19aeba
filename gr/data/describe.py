"""Facts of a sequence dataset: lengths, popularity, times, health.  One pass over its blocks, one block in memory.

Shapes: R users of a block, A their actions, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gr.data.dataset import SequenceDataset
from gr.data.making.times import EARLY, LIKELY, when
from gr.data.outputs import delivered
from gr.data.sequences import Sequences
from gr.data.stores import is_url
from gr.errors import UserError

POPULAR = 10
TITLE_COLUMNS = ("title", "name", "item_id")


@dataclass
class Health:
    """Counts of what may harm training.  ``ties``: pairs of neighbouring actions at the same time; ``last_ties``:
    users whose last two actions tie; ``repeats``: actions that repeat an earlier (item, time) of their user;
    ``unsorted``: users whose times go back; ``early``: actions before 1980, ``epoch``: at time 0 or -1 (in a log that
    ends before 1980, whose clock is its own, none)."""

    empty: int = 0
    single: int = 0
    short: int = 0
    unsorted: int = 0
    early: int = 0
    epoch: int = 0
    pairs: int = 0
    ties: int = 0
    last_ties: int = 0
    repeats: int = 0
    repeated_items: int = 0
    unseen_items: int = 0
    out_of_range: int = 0
    miscounted_items: int = 0


@dataclass
class Description:
    """What :func:`describe` found.  ``lengths``: length -> users; ``counts_I``: actions of each item."""

    lengths: np.ndarray
    counts_I: np.ndarray
    first_time: int | None = None
    last_time: int | None = None
    health: Health = field(default_factory=Health)

    def unit_doubt(self) -> str:
        """A doubt about the unit in which the log's times were read, "" without one."""
        if self.last_time is None or EARLY <= self.last_time < LIKELY[1]:
            return ""
        for scale in (10**3, 10**6, 10**9):
            if LIKELY[0] <= (self.first_time or 0) * scale and self.last_time * scale < LIKELY[1]:
                coarser = f"a unit {scale:,} times as long they would end at {when(self.last_time * scale)}"
                return f"is the schema's time_unit right? In {coarser}"
        return "is the schema's time_unit right?"

    def length_quantiles(self, shares: tuple[float, ...]) -> list[int]:
        """Smallest lengths that the given shares of the users do not exceed."""
        cumulative = np.cumsum(self.lengths)
        return [int(np.searchsorted(cumulative, max(share * cumulative[-1], 1))) for share in shares]

    def length_histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, users) over lengths 0, 1, 2-3, 4-7, ... up to the longest."""
        edges = [0, *(1 << n for n in range(len(self.lengths).bit_length() + 1))]
        bins = [(a, b - 1, int(self.lengths[a:b].sum())) for a, b in zip(edges, edges[1:])]
        first = next(n for n, b in enumerate(bins) if b[2])
        last = max(n for n, b in enumerate(bins) if b[2])
        return bins[first : last + 1]

    def popular(self, items: int = POPULAR) -> list[int]:
        """Rows of the most popular items, ties by row."""
        return np.argsort(-self.counts_I, kind="stable")[:items].tolist()

    def share_of_top(self, share: float) -> float:
        """Share of the actions that the most popular ``share`` of the items take."""
        counts = np.sort(self.counts_I)[::-1]
        return float(counts[: max(round(share * len(counts)), 1)].sum() / max(counts.sum(), 1))


def describe(dataset: SequenceDataset) -> Description:
    """Read the whole dataset once.  Memory: one block, and the counts of the items."""
    found = Description(np.zeros(1, dtype=np.int64), np.zeros(dataset.items, dtype=np.int64))
    for rows in blocks(dataset):
        lengths = np.bincount(rows.lengths_R, minlength=len(found.lengths))
        lengths[: len(found.lengths)] += found.lengths
        found.lengths = lengths
        inside = (rows.items_A >= 0) & (rows.items_A < dataset.items)
        found.health.out_of_range += int((~inside).sum())
        found.counts_I += np.bincount(rows.items_A[inside], minlength=dataset.items)
        _repeats(rows, found.health)
        if rows.timestamps_A is not None and len(rows.timestamps_A):
            low, high = int(rows.timestamps_A.min()), int(rows.timestamps_A.max())
            found.first_time = low if found.first_time is None else min(low, found.first_time)
            found.last_time = high if found.last_time is None else max(high, found.last_time)
            _times(rows, found.health)
    if found.last_time is None or found.last_time < EARLY:
        found.health.early = found.health.epoch = 0
    lengths = np.concatenate([found.lengths, np.zeros(3, dtype=np.int64)])
    found.health.empty, found.health.single, found.health.short = map(
        int, (lengths[0], lengths[1], lengths[2])
    )
    found.health.unseen_items = int((found.counts_I == 0).sum())
    found.health.miscounted_items = int((dataset.catalogue["count"].to_numpy() != found.counts_I).sum())
    return found


def blocks(dataset: SequenceDataset) -> Iterator[Sequences]:
    return dataset.read_blocks(range(len(dataset.manifest.blocks)))


def titles(dataset: SequenceDataset, items: list[int]) -> list[str]:
    """What to call the items: their title, name or raw id."""
    catalogue = dataset.catalogue
    column = next(c for c in TITLE_COLUMNS if c in catalogue.column_names)
    named = catalogue[column].take(items).to_pylist()
    ids = catalogue["item_id"].take(items).to_pylist()
    return [str(raw if name is None else name) for name, raw in zip(named, ids)]


def samples(dataset: SequenceDataset, users: int) -> Sequences:
    """Users at even distances through the dataset, whole."""
    chosen = np.unique(np.linspace(0, dataset.users - 1, min(users, dataset.users)).astype(int))
    return Sequences.concatenate([dataset.read_rows(n, n + 1) for n in chosen.tolist()])


def plot(dataset: SequenceDataset, found: Description, path: str | Path) -> None:
    """Save a figure of the distributions of lengths and popularity; the format is the file's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lengths = np.flatnonzero(found.lengths)
    longer = found.lengths[::-1].cumsum()[::-1][lengths] / found.lengths.sum()
    left.step(np.maximum(lengths, 1), longer, where="post")
    left.set(xscale="log", xlabel="actions of a user, at least", ylabel="share of users", ylim=(0, 1.02))
    counts = np.sort(found.counts_I)[::-1]
    counts = counts[counts > 0]
    right.plot(np.arange(1, len(counts) + 1), counts)
    right.set(xscale="log", yscale="log", xlabel="rank of the item", ylabel="actions")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    for axis in (left.xaxis, right.xaxis, right.yaxis):  # 20 and 1,000 instead of powers of ten
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_formatter(LogFormatter())
    figure.suptitle(f"{dataset.manifest.name}: {dataset.manifest.counts}")
    if not is_url(str(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with delivered(path) as scratch:
        figure.savefig(scratch, format=figure_format(path))


def figure_format(path: str | Path) -> str:
    """The format of a figure called ``path``, if there is such a one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = Path(path)
    ending = file.suffix.removeprefix(".")
    if ending not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"cannot save a figure as '{file.name}': end it in .png, .svg or .pdf")
    return ending


def _times(rows: Sequences, health: Health) -> None:
    assert rows.timestamps_A is not None
    user = np.repeat(np.arange(len(rows)), rows.lengths_R)
    same_user = user[1:] == user[:-1]
    steps = np.diff(rows.timestamps_A)
    health.pairs += int(same_user.sum())
    health.ties += int((same_user & (steps == 0)).sum())
    health.unsorted += len(np.unique(user[1:][same_user & (steps < 0)]))
    epoch = int(((rows.timestamps_A == 0) | (rows.timestamps_A == -1)).sum())
    health.epoch += epoch
    health.early += int((rows.timestamps_A < EARLY).sum()) - epoch
    two = rows.lengths_R >= 2
    last = rows.offsets_R1[1:][two] - 1
    health.last_ties += int((rows.timestamps_A[last] == rows.timestamps_A[last - 1]).sum())


def _repeats(rows: Sequences, health: Health) -> None:
    """Actions that repeat an item of their user, and those that repeat it at the same time."""
    user = np.repeat(np.arange(len(rows)), rows.lengths_R)
    order = np.lexsort((rows.items_A, user))
    same = (user[order][1:] == user[order][:-1]) & (rows.items_A[order][1:] == rows.items_A[order][:-1])
    health.repeated_items += int(same.sum())
    if rows.timestamps_A is not None:
        order = np.lexsort((rows.timestamps_A, rows.items_A, user))
        columns = (user, rows.items_A, rows.timestamps_A)
        health.repeats += int(np.logical_and.reduce([c[order][1:] == c[order][:-1] for c in columns]).sum())
