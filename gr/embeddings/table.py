"""Embedding tables: what they answer for the whole catalogue, and what they give to a step.

A table is named, has I rows of width D, and perhaps a bias column: a number a row.  Models and losses never see its
rows but through two doors: the **view** of the rows that a step needs (:class:`gr.embeddings.view.View`), and the
answers for all rows (``topk``, ``ranks``, ``cross_entropy``), which are formed where the rows are, chunk by chunk.
Tables stand outside the module that an engine wraps.  ``gr.registry.TABLES`` has the kinds.

Shapes: B, T queries, C rows of a chunk, I rows, D width, U rows of a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gr.embeddings.ranks import Excluded, best_rows, target_ranks
from gr.embeddings.row_updates import RowGradients
from gr.embeddings.scoring import Scoring
from gr.embeddings.view import View
from gr_kernels.counter_random import derive_key, truncated_normal_rows

MAX_SCORES = 1 << 24
"""Scores that exist at once while all rows are gone through."""


@dataclass(frozen=True)
class TableSpec:
    """What a table is, wherever its rows are: I ``rows`` of width ``dim``, and a bias column where ``bias`` says so.

    Rows start from N(0, std^2) cut at +-2 std; the value at (row, column) depends on (seed, name, row, column) alone.
    Biases start from zero.
    """

    name: str
    rows: int
    dim: int
    std: float
    seed: int
    bias: bool = False

    def first_rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) float32: the first values of a range of rows."""
        key = derive_key(self.seed, "table", self.name)
        return truncated_normal_rows(key, range(start, stop), self.dim, self.std)


class Table(ABC):
    """The rows of a :class:`TableSpec`, float32."""

    spec: TableSpec
    whole = True
    """Whether a view is the whole table, so that nobody needs to say which rows are wanted."""
    dense = True
    """Whether the gradient is a tensor of the table's size on every process, which the engine adds up and moves as it
    does any other parameter's.  Others keep their rows to themselves and move them by ``update``."""

    has_cross_entropy = True
    """Whether it has :meth:`cross_entropy`, which gives every row a gradient in every step."""

    name = property(lambda self: self.spec.name)
    rows = property(lambda self: self.spec.rows)
    dim = property(lambda self: self.spec.dim)

    @abstractmethod
    def columns(self) -> dict[str, Tensor]:
        """``weight`` (I, D), and ``bias`` (I,) where there is one: the table's own memory, to be saved or filled."""

    # -- a step ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def view(self, wanted: Sequence[Tensor]) -> View:
        """The rows that this process needs for a step, given by row numbers (tensors of any shape and number).

        Every process of the run calls this together, once a step.
        """

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        """The sum over t of the cross-entropy of target t against all rows: a float32 scalar, differentiable in the
        queries and in the table.  Only of tables that say so (``has_cross_entropy``)."""
        raise TypeError(f"{type(self).__name__} has no gradient for every row")

    def gather_gradients(self, view: View) -> RowGradients:
        """The gradients of the rows that this process owns, summed over everybody's views; all processes call this
        together, and when it returns nobody reads the rows any more.  Only of tables that aren't ``dense``."""
        raise TypeError(f"{type(self).__name__} has dense gradients")

    def own_chunks(self) -> Iterator[tuple[int, int]]:
        """The rows that this process owns, (start, stop) a chunk at a time.  Only of tables that aren't ``dense``."""
        raise TypeError(f"{type(self).__name__} has dense gradients")

    # -- the whole catalogue --------------------------------------------------------------------------------------

    @abstractmethod
    def vectors(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (exclusive), (stop - start, D)."""

    @abstractmethod
    def biases(self, start: int, stop: int) -> Tensor:
        """The bias column of rows ``start`` to ``stop``; only of a table that has one."""

    @abstractmethod
    def chunk_scores(self, queries_BD: Tensor, start: int, stop: int, scoring: Scoring) -> Tensor:
        """(B, stop - start) float32 scores of a range of rows."""

    @torch.no_grad()
    def scores(self, queries_BD: Tensor, scoring: Scoring) -> Tensor:
        """(B, I) float32 scores of all rows: for catalogues of which that many numbers are no harm."""
        return self.chunk_scores(queries_BD, 0, self.rows, scoring)

    @torch.no_grad()
    def topk(
        self, queries_BD: Tensor, k: int, scoring: Scoring, exclude: Excluded | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best rows of each query, exactly: (scores, rows), both (B, min(k, I)), best first.

        exclude: jagged rows never to return; where fewer than k are left, the score of the rest is -inf.
        """
        chunks = self._chunks(queries_BD, scoring, at_least=k)
        return best_rows(chunks, queries_BD.shape[0], k, self.rows, exclude, queries_BD)

    @torch.no_grad()
    def ranks(
        self, queries_BD: Tensor, targets_B: Tensor, scoring: Scoring, exclude: Excluded | None = None
    ) -> Tensor:
        """(B,) float64 exact ranks of the targets (gr.embeddings.ranks); NaN for a query with a NaN score."""
        return target_ranks(lambda: self._chunks(queries_BD, scoring), targets_B, self.rows, exclude)

    def chunk_rows(self, queries: int) -> int:
        """Rows of a chunk while all are gone through for so many queries."""
        return max(MAX_SCORES // max(1, queries), 1)

    def _chunks(
        self, queries_BD: Tensor, scoring: Scoring, at_least: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        step = max(at_least, self.chunk_rows(queries_BD.shape[0]))
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            yield start, self.chunk_scores(queries_BD, start, stop, scoring)
