"""synthetic-dp: the Dirichlet-process stream of the HSTU paper (arXiv 2402.17152, section 4 and its appendix), and
the oracle that knows everything about it but the next draw.

Items become available as the stream goes on: at record r of R the ids below (start + (1 - start) r / R) I are.
Every record has a few categories with a prior H over them and a concentration alpha; its n-th action falls into
category c with probability (alpha H_c + n_c) / (alpha + n - 1), n_c being the earlier actions of c in this record
(that is: with probability alpha / (alpha + n - 1) a draw from H, else the category of an earlier action), and is a
uniformly random available item of c.

What the paper leaves open is decided here, and written into the manifest's provenance (``CHOICES``).

Record r is a function of (options, r) alone: it uses Philox words r * W to (r + 1) * W of one stream, W fixed, so
that any records can be made anywhere, in any order.

Shapes: R records made together, L actions a record, S category slots of a record, M deck size (most available
items of a category), C categories, I catalogue size, B sequences of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from gr.config import POSITIVE, SEED
from gr.data.dataset import SequenceDataset
from gr.data.hashing import derive
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.sources.base import QUIET, Source
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from gr.batch import SequenceBatch

NAME = "synthetic-dp"
GENERATOR_VERSION = 1  # goes up when the same options would give another stream
CHOICES = {
    "number of categories of a record": "uniform on 1 .. max_categories_per_record",
    "categories of a record": "distinct, uniform",
    "prior over them": "Dirichlet(1, ..., 1)",
    "item of a category, repeats on": "uniform over the available ones, independent of the history",
    "item of a category, repeats off": "dealt without replacement; dealt anew once all available ones were dealt",
    "category of an item": "uniform, independent for every item",
}
_CHUNK_RECORDS = 1024
_TIE_STEP = 2.0**-22


class StreamOptions(Source.Options):
    """The stream's parameters; the defaults are the paper's.

    ``alpha_max``: alpha is uniform on (1, alpha_max).  ``start_fraction``: share of the catalogue available to the
    first record.  ``repeats``: whether a record may hold an item twice by chance.  ``category_exponent``: a record's
    categories are drawn in proportion to (c + 1)^-exponent, c being the category's number; 0, the paper's, makes all
    alike.
    """

    records: POSITIVE = 1_000_000
    length: Annotated[int, Field(ge=2)] = 128
    items: POSITIVE = 20_000
    categories: POSITIVE = 100
    max_categories_per_record: POSITIVE = 5
    alpha_max: Annotated[float, Field(ge=1)] = 500.0
    start_fraction: Annotated[float, Field(gt=0, le=1)] = 0.4
    repeats: bool = True
    category_exponent: Annotated[float, Field(ge=0)] = 0.0
    seed: SEED = 1


@dataclass(frozen=True)
class Records:
    """R records after ``steps`` actions each.

    items_RL: int32 catalogue rows drawn so far.  alpha_R, prior_SR: float64, prior 0 in unused slots.
    categories_SR: category of a slot.  available_SR: available items of that category.
    counts_SR: actions of the slot so far.  decks_SRM: with repeats off, positions within the category; the first
    ``counts % available`` of a deck are the ones dealt in the current round.
    """

    items_RL: np.ndarray
    alpha_R: np.ndarray
    prior_SR: np.ndarray
    categories_SR: np.ndarray
    available_SR: np.ndarray
    counts_SR: np.ndarray
    decks_SRM: np.ndarray | None


class Generator:
    """The stream: any records of it, on request."""

    def __init__(self, options: StreamOptions):
        self.options = options
        slots = min(options.max_categories_per_record, options.categories)
        self.slots = slots
        # words of a record: alpha, number of categories, S category picks, S prior draws, then (category, item) x L
        words = 2 + 2 * slots + 2 * options.length
        self.words = -(-words // 4) * 4  # Philox makes four at a time
        self._key = derive(options.seed, NAME, GENERATOR_VERSION)

        draw = np.random.Philox(key=derive(options.seed, NAME, "categories")).random_raw(options.items)
        self.category_I = np.floor(_uniform(draw) * options.categories).astype(np.int64)
        # items grouped by category, ascending within it: the available ones of a category are a prefix of its group
        self.members_I = np.argsort(self.category_I, kind="stable")
        self._group_keys_I = self.category_I[self.members_I] * options.items + self.members_I
        self.first_C = np.searchsorted(self._group_keys_I, np.arange(options.categories) * options.items)
        self.weights_C = (np.arange(options.categories) + 1.0) ** -options.category_exponent
        at_start = self._available(np.arange(options.categories), np.zeros(1, dtype=np.int64))
        if (at_start == 0).any():
            raise UserError(
                f"synthetic-dp: category {int(at_start.argmin())} has no item at the start of the stream "
                f"({options.items} items x start_fraction {options.start_fraction:g} over {options.categories} "
                "categories): raise items or start_fraction, or lower categories"
            )

    def available_ids(self, records_R: np.ndarray) -> np.ndarray:
        """Ids below this one are available to a record."""
        options = self.options
        share = options.start_fraction + (1 - options.start_fraction) * records_R / options.records
        return np.clip(np.floor(share * options.items).astype(np.int64), 1, options.items)

    def _available(self, categories: np.ndarray, records_R: np.ndarray) -> np.ndarray:
        limits = categories * self.options.items + self.available_ids(records_R)
        return np.searchsorted(self._group_keys_I, limits) - self.first_C[categories]

    def _uniforms(self, records_R: np.ndarray) -> np.ndarray:
        """The records' random numbers, (W, R) float64 in [0, 1)."""
        raw = np.empty((len(records_R), self.words), dtype=np.uint64)
        breaks = np.flatnonzero(np.diff(records_R) != 1) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(records_R)], strict=True):
            if stop > start:
                stream = np.random.Philox(key=self._key, counter=int(records_R[start]) * self.words // 4)
                raw[start:stop] = stream.random_raw((stop - start) * self.words).reshape(-1, self.words)
        return np.ascontiguousarray(_uniform(raw).T)

    def make(self, records_R: np.ndarray, steps: int) -> Records:
        """The given records up to and including their ``steps``-th action; draws after it are not looked at."""
        slots, records = self.slots, np.arange(len(records_R))
        uniform_WR = self._uniforms(records_R)
        alpha_R = 1 + (self.options.alpha_max - 1) * uniform_WR[0]
        used_R = 1 + np.floor(uniform_WR[1] * slots)
        picks_SR, prior_draws_SR = uniform_WR[2 : 2 + slots], uniform_WR[2 + slots : 2 + 2 * slots]
        draws = uniform_WR[2 + 2 * slots :]

        if self.options.category_exponent:
            categories_SR = _distinct_weighted(picks_SR, self.weights_C)
        else:
            categories_SR = _distinct(picks_SR, self.options.categories)
        # normalised exponentials are Dirichlet(1, ..., 1)
        weights_SR = np.where(np.arange(slots)[:, None] < used_R, -np.log1p(-prior_draws_SR), 0.0)
        prior_SR = weights_SR / weights_SR.sum(axis=0)
        available_SR = self._available(categories_SR, records_R)

        counts_SR = np.zeros((slots, len(records)), dtype=np.int64)
        decks_SRM = None
        if not self.options.repeats:
            size = int(available_SR.max(initial=0))
            decks_SRM = np.broadcast_to(np.arange(size, dtype=np.int32), (slots, len(records), size)).copy()

        # Cumulative weights alpha H_c + n_c over the slots; their last is alpha + n - 1.  An action of slot s adds one
        # to all from s on.
        cumulative_SR = np.cumsum(alpha_R * prior_SR, axis=0)
        slot_numbers_S1 = np.arange(slots)[:, None]
        first_SR = self.first_C[categories_SR]
        items_LR = np.empty((steps, len(records)), dtype=np.int32)
        for step in range(steps):
            category_draw_R, item_draw_R = draws[2 * step], draws[2 * step + 1]
            slot_R = (category_draw_R * cumulative_SR[-1] >= cumulative_SR[:-1]).sum(axis=0)
            available_R = available_SR[slot_R, records]
            if decks_SRM is None:
                position_R = np.floor(item_draw_R * available_R).astype(np.int64)
            else:
                dealt_R = counts_SR[slot_R, records] % available_R
                position_R = _deal(decks_SRM, slot_R, dealt_R, available_R, item_draw_R)
            items_LR[step] = self.members_I[first_SR[slot_R, records] + position_R]
            cumulative_SR += slot_numbers_S1 >= slot_R
            counts_SR[slot_R, records] += 1
        return Records(items_LR.T, alpha_R, prior_SR, categories_SR, available_SR, counts_SR, decks_SRM)

    def next_item(self, state: Records, tie_step: float = 0.0) -> np.ndarray:
        """Predictive probabilities (R, I) float64 of every record's next action, given all about it but that draw.

        With ``tie_step`` the j-th of a category's equally probable items is lowered by the factor 1 - j * tie_step.
        """
        slots, records = state.prior_SR.shape
        actions = state.items_RL.shape[1]
        category_SR = (state.alpha_R * state.prior_SR + state.counts_SR) / (state.alpha_R + actions)
        dealt_SR = (
            np.zeros_like(state.counts_SR)
            if state.decks_SRM is None
            else state.counts_SR % state.available_SR
        )
        item_SR = category_SR / (state.available_SR - dealt_SR)
        probability = np.zeros((records, self.options.items))
        for slot in range(slots):
            for record in range(records):
                left = slice(dealt_SR[slot, record], state.available_SR[slot, record])
                first = self.first_C[state.categories_SR[slot, record]]
                positions = np.arange(left.start, left.stop)
                if state.decks_SRM is not None:
                    positions = state.decks_SRM[slot, record, left]
                untied = 1 - tie_step * np.arange(len(positions))
                probability[record, self.members_I[first + positions]] = item_SR[slot, record] * untied
        return probability


class SyntheticDP(Source):
    """Writes the stream as a sequence dataset in the stream's order: user_id is the record's number, no times."""

    name = NAME
    Options = StreamOptions
    options: StreamOptions

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        """Nothing is read, ``source`` is not used.  Memory: a chunk of records, whatever the stream's size."""
        if engine.name != "process":
            raise UserError(
                f"synthetic-dp is generated by one process, not on {engine.name}: leave --engine out"
            )
        if source is not None:
            progress.note(f"synthetic-dp is generated: the source '{source}' is not read")
        options = self.options
        generator = Generator(options)
        counts_I = np.zeros(options.items, dtype=np.int64)
        writer = DatasetWriter(out, NAME, row_order="stream", overwrite=overwrite)
        try:
            with progress.stage("generating", options.records * options.length, "actions") as stage:
                for start in range(0, options.records, _CHUNK_RECORDS):
                    records_R = np.arange(start, min(start + _CHUNK_RECORDS, options.records))
                    items_A = generator.make(records_R, options.length).items_RL.reshape(-1)
                    counts_I += np.bincount(items_A, minlength=options.items)
                    offsets_R1 = np.arange(len(records_R) + 1, dtype=np.int64) * options.length
                    writer.add(Sequences.of(records_R, offsets_R1, item=items_A))
                    stage.advance(len(items_A))
            catalogue = pa.table(
                {
                    "item_id": np.arange(options.items),
                    "count": counts_I,
                    "category": generator.category_I.astype(np.int32),
                }
            )
            provenance = {
                "source": NAME,
                "generator_version": GENERATOR_VERSION,
                "options": options.model_dump(),
                "choices": CHOICES,
            }
            return writer.finish(catalogue, provenance)
        except BaseException:
            writer.abandon()
            raise


class Oracle:
    """The best possible scorer of a synthetic-dp dataset: the exact probabilities of the next item.

    It knows a record's categories, prior, alpha, the items available and all actions before the target, but not the
    target's draw.  Its HR and NDCG are the ceiling of every model on the same stream.

    All items of a category that may come next are equally probable, and ranks count half of the ties: some two hundred
    tied items at the top would make the best scorer miss always.  So ties are broken, in an order that has nothing to
    do with the target, by steps of 2^-22 (two to four float32 steps), too small to reorder anything that matters.
    """

    judged_by = "catalogue"
    gives_probabilities = True

    def __init__(self, dataset: SequenceDataset):
        provenance = dataset.manifest.provenance
        if provenance.get("source") != NAME:
            raise UserError(
                f"the oracle knows synthetic-dp streams only and '{dataset.path}' is '{dataset.manifest.name}': "
                "leave the oracle out, or prepare synthetic-dp"
            )
        if provenance.get("generator_version") != GENERATOR_VERSION:
            raise UserError(
                f"'{dataset.path}' was made by generator version {provenance.get('generator_version')}, the oracle "
                f"knows version {GENERATOR_VERSION}: prepare the dataset again"
            )
        self.options = StreamOptions.model_validate(provenance["options"])
        self.generator = Generator(self.options)

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, I) float32 probabilities of each record's last action, ties broken.

        ``batch.ordinals_B`` are record numbers; the sequences end with the record's last action (which is not looked
        at) and may begin late.  Raises UserError if the actions before the target are not the end of the record's.
        """
        import torch

        records_B = batch.ordinals_B.cpu().numpy()
        steps = self.options.length - 1
        state = self.generator.make(records_B, steps)
        self._check(batch, state.items_RL)
        probability = self.generator.next_item(state, tie_step=_TIE_STEP)
        return torch.from_numpy(probability.astype(np.float32)).to(batch.items_T.device)

    @staticmethod
    def _check(batch: SequenceBatch, history_BL: np.ndarray) -> None:
        items_T = batch.items_T.cpu().numpy()
        stop = np.cumsum(batch.lengths, dtype=np.int64)
        for index, length in enumerate(batch.lengths):
            given = items_T[stop[index] - length : max(stop[index] - 1, stop[index] - length)]
            if len(given) > history_BL.shape[1] or not np.array_equal(
                given, history_BL[index, history_BL.shape[1] - len(given) :]
            ):
                raise UserError(
                    f"the oracle predicts the last action of a record, and sample {int(batch.ordinals_B[index])} "
                    "does not end there: evaluate with data.split 'records'"
                )


def _uniform(raw: np.ndarray) -> np.ndarray:
    """uint64 words to float64 in [0, 1): the upper 53 bits."""
    return (raw >> np.uint64(11)) * 2.0**-53


def _distinct(uniform_SR: np.ndarray, count: int) -> np.ndarray:
    """S distinct numbers below ``count`` for each record, uniform: the first S steps of a Fisher-Yates shuffle."""
    slots, records = uniform_SR.shape
    deck_RC = np.tile(np.arange(count), (records, 1))
    row_R = np.arange(records)
    for slot in range(slots):
        other_R = slot + np.floor(uniform_SR[slot] * (count - slot)).astype(np.int64)
        deck_RC[row_R, slot], deck_RC[row_R, other_R] = deck_RC[row_R, other_R], deck_RC[row_R, slot]
    return np.ascontiguousarray(deck_RC[:, :slots].T)


def _distinct_weighted(uniform_SR: np.ndarray, weights_C: np.ndarray) -> np.ndarray:
    """S distinct numbers below C for each record, one after the other, each in proportion to the weights of those that
    are left."""
    records = np.arange(uniform_SR.shape[1])
    left_RC = np.tile(weights_C, (len(records), 1))
    picked_SR = np.empty(uniform_SR.shape, dtype=np.int64)
    for slot, uniform_R in enumerate(uniform_SR):
        cumulative_RC = left_RC.cumsum(axis=1)
        # the last sum is never reached by a number below one but for rounding, and what is gone has no width
        reached_R = (uniform_R * cumulative_RC[:, -1])[:, None] >= cumulative_RC
        picked_SR[slot] = np.minimum(reached_R.sum(axis=1), len(weights_C) - 1)
        left_RC[records, picked_SR[slot]] = 0.0
    return picked_SR


def _deal(
    decks_SRM: np.ndarray, slot_R: np.ndarray, dealt_R: np.ndarray, size_R: np.ndarray, uniform_R: np.ndarray
) -> np.ndarray:
    """One card of each record's deck ``slot_R``, uniform over the not yet dealt: a step of a Fisher-Yates shuffle in
    place.  At ``dealt == 0`` the round starts over from whatever order the last one left, which is as good as any."""
    row_R = np.arange(len(slot_R))
    other_R = dealt_R + np.floor(uniform_R * (size_R - dealt_R)).astype(np.int64)
    card_R = decks_SRM[slot_R, row_R, other_R]
    decks_SRM[slot_R, row_R, other_R] = decks_SRM[slot_R, row_R, dealt_R]
    decks_SRM[slot_R, row_R, dealt_R] = card_R
    return card_R
