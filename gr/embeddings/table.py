"""Embedding tables: what they answer for the whole catalogue, and what they give to a step.

A table is named, has I rows of width D, and perhaps a bias column: a number a row.  Models and losses never see its
rows but through two doors: the **view** of the rows that a step needs (:class:`gr.embeddings.view.View`), and the
answers for all rows (``topk``, ``standing``, ``cross_entropy``), which are formed where the rows are, chunk by chunk.
Tables stand outside the module that an engine wraps.  ``gr.registry.TABLES`` has the kinds.

Shapes: B, T queries, C rows of a chunk, I rows, D width, U rows of a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gr.embeddings.ranks import Excluded, Standing, best_rows, target_standing
from gr.embeddings.row_updates import Gradient, Maths, Piece, RowOptimizer
from gr.embeddings.scoring import Scoring
from gr.embeddings.view import Numbering, View, gradient_of
from gr.modality.digest import Sketch
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.counter_random import derive_key, truncated_normal_rows
from gr_kernels.tracing import on_paper_now

Array = tuple[list[int], int, Tensor]
"""Of what is cut by rows: (size of the whole, first of the rows that are here, those: their own memory)."""

MAX_SCORES = 1 << 24
"""Scores that exist at once while all rows are gone through."""


_LATER: ContextVar[bool] = ContextVar("rows_come_later", default=False)


@contextmanager
def rows_come_later(later: bool = True) -> Iterator[None]:
    """Inside, tables are made whose every row will be loaded before anybody looks: no time is spent on first values,
    and no memory is touched that the system gives page by page."""
    before = _LATER.set(later)
    try:
        yield
    finally:
        _LATER.reset(before)


def filled_now() -> bool:
    """Whether a table that is made starts from first values."""
    return not _LATER.get()


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
    maths: Maths | None = None
    """How its rows will move: for plans, and for kernels that do it themselves; None where they won't."""
    apart: bool = False
    """Whether only rows that a step looks up have gradients: no softmax over all gives every row one."""

    @property
    def moments(self) -> int:
        """Numbers that the optimiser keeps beside each."""
        return 0 if self.maths is None else len(self.maths.moments)

    @property
    def row_moments(self) -> int:
        """Numbers that it keeps beside each row of a column."""
        return 0 if self.maths is None else len(self.maths.row_moments)

    def first_rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) float32: the first values of a range of rows."""
        return self.first_values(range(start, stop))

    def first_values(self, rows: range | Tensor) -> Tensor:
        """(n, D) float32: the first values of n ``rows``, int64 where they are a tensor."""
        if on_paper_now():
            return torch.empty(len(rows), self.dim)
        key = derive_key(self.seed, "table", self.name)
        return truncated_normal_rows(key, rows, self.dim, self.std)


class Table(ABC):
    """The rows of a :class:`TableSpec`, float32.

    whole: a view is the whole table, so that nobody needs to say which rows are wanted.  dense: the gradient is a
    tensor of the table's size on every process, which the engine adds up and moves as it does any other parameter's;
    others keep their rows to themselves, in pieces.  replicated: every process has the same pieces.  collective: all
    processes must ask for views and search the catalogue together, the same number of times.  by_columns: a row lies
    on several processes.  formed: rows aren't kept but formed, from parameters that are dense and from rows of the
    tables ``beneath``, so that what a step's micro-batches leave at a view has to be taken back.
    """

    spec: TableSpec
    whole = False
    dense = False
    replicated = False
    collective = False
    by_columns = False
    formed = False
    beneath: tuple[Table, ...] = ()

    has_cross_entropy = True
    """Whether it has :meth:`cross_entropy`, which gives every row a gradient in every step."""

    name = property(lambda self: self.spec.name)
    rows = property(lambda self: self.spec.rows)
    dim = property(lambda self: self.spec.dim)

    # -- a step ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def view(self, wanted: Sequence[Tensor]) -> View:
        """The rows that this process needs for a step, given by row numbers (tensors of any shape and number).

        Every process of the run calls this together, once a step.
        """

    def views(self, wanted: Sequence[Tensor]) -> dict[str, View]:
        """The view by the table's name, and beside it those of the tables ``beneath``."""
        return {self.name: self.view(wanted)}

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        """The sum over t of the cross-entropy of target t against all rows: a float32 scalar, differentiable in the
        queries and in the table.  Only of tables that say so (``has_cross_entropy``)."""
        raise TypeError(f"{type(self).__name__} has no gradient for every row")

    def named_shared(self, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that form rows and belong to none of them, those that don't train too; a table that keeps its
        rows has none."""
        return iter(())

    def outside_digest(self) -> str:
        """Of weights that form its rows, stay as they are and are none of its parameters; "" where there are none."""
        return ""

    def encoder_digest(self) -> str:
        """Of the weights of the encoder that forms its rows, as it came to the run; "" where there is none."""
        return ""

    def made_of(self) -> dict[str, str]:
        """Digests, by kind, of what its rows are formed from beside weights: ``tokenizer``, ``tokens`` (of all texts),
        ``pictures`` (of some, one after another, :data:`gr.modality.pictures.DIGITS` each; on the first process),
        ``statistics`` (of an encoder that has running means), ``settings`` (of how an encoder computes).  Every process
        calls this together."""
        return {}

    def sketch(self, rows: int | None = None) -> Sketch | None:
        """Of the vectors in a file that its first ``rows`` are formed from, all without it; None where no file is.
        Every process calls this together."""
        return None

    def state(self) -> dict[str, Array]:
        """What it keeps from step to step beside rows and parameters, by name: to be saved, or filled."""
        return {}

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this process owns of the table: its own memory, to be moved, saved or filled."""

    def gather_gradients(self, view: View) -> list[Gradient]:
        """The gradients of the pieces, summed over everybody's views; all processes call this together, and when it
        returns nobody reads the rows any more.  Only of tables that aren't ``dense``."""
        raise TypeError(f"{type(self).__name__} has dense gradients")

    def take_back(self, view: View) -> None:
        """What a step's micro-batches left at its ``view`` goes on to the parameters that formed it; all processes call
        this together, after the last one and before gradients are exchanged.  Only of tables that are ``formed``."""
        raise TypeError(f"{type(self).__name__} keeps its rows")

    def zeros(self, piece: Piece, moment: str, columns: int) -> Tensor:
        """Memory for an optimiser's moment beside a piece: (its rows, columns) float32 zeros."""
        return torch.zeros(len(piece.values_RC), columns, device=piece.values_RC.device)

    @torch.no_grad()
    def restart(self, rows_N: Tensor) -> None:
        """``rows_N`` (int64, on the CPU) have their first values again; all processes call this with the same ones, and
        nobody may read the table until all have done so."""
        for piece in self.pieces():
            own_N = piece.own(rows_N)
            first_NC: Tensor | float = 0.0
            if piece.column == "weight":
                first_ND = self.spec.first_values(own_N + piece.row0)
                first_NC = first_ND[:, piece.col0 : piece.col0 + piece.values_RC.shape[1]]
                first_NC = first_NC.to(piece.values_RC.device)
            piece.values_RC[own_N.to(piece.values_RC.device)] = first_NC
        self.refilled()

    def row_optimizer(self, maths: Maths, param_groups: list[dict[str, Any]]) -> RowOptimizer:
        """What moves its pieces by :meth:`gather_gradients`; ``param_groups`` as a :class:`RowOptimizer` has them."""
        return RowOptimizer(self.name, self.pieces(), maths, param_groups, self.zeros)

    def refilled(self) -> None:  # noqa: B027  (most tables keep nothing that depends on it)
        """Somebody else has written into the pieces, or into the moments beside them."""

    # -- the whole catalogue --------------------------------------------------------------------------------------

    @abstractmethod
    def vectors(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (exclusive), (stop - start, D)."""

    @abstractmethod
    def biases(self, start: int, stop: int) -> Tensor:
        """The bias column of rows ``start`` to ``stop``; only of a table that has one."""

    def chunk_scores(self, queries_BD: Tensor, start: int, stop: int, scoring: Scoring) -> Tensor:
        """(B, stop - start) float32 scores of a range of rows."""
        scores_BC = candidate_scores(
            queries_BD * scoring.scale,
            scoring.columns(self.vectors(start, stop)),
            range(stop - start),
            normalize_eps=scoring.normalize_eps,
        )
        return scores_BC + self.biases(start, stop) if scoring.bias else scores_BC

    @torch.no_grad()
    def scores(self, queries_BD: Tensor, scoring: Scoring) -> Tensor:
        """(B, I) float32 scores of all rows: for catalogues of which that many numbers are no harm."""
        return torch.cat([scores for _, scores in self._chunks(queries_BD, scoring)], dim=1)

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
    def standing(
        self, queries_BD: Tensor, targets_B: Tensor, scoring: Scoring, exclude: Excluded | None = None
    ) -> Standing:
        """Exact ranks of the targets, and their losses against all rows (gr.embeddings.ranks)."""
        return target_standing(lambda: self._chunks(queries_BD, scoring), targets_B, self.rows, exclude)

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


def local_gradients(view: View) -> Tensor:
    """(U, D), or (U, D + 1) with the bias's: what backward left at a view."""
    columns = [gradient_of(view.weight_UD)]
    if view.bias_U is not None:
        columns.append(gradient_of(view.bias_U)[:, None])
    return torch.cat(columns, dim=1)


def leaves(weight_UD: Tensor, bias_U: Tensor | None, numbering: Numbering) -> View:
    """A view of fetched rows, whose gradients will be taken back."""
    bias_U = None if bias_U is None else bias_U.detach().requires_grad_()
    return View(weight_UD.detach().requires_grad_(), bias_U, numbering)


def matrix(values: Tensor) -> Tensor:
    """A column of the table as a matrix: (I,) becomes (I, 1), the same memory."""
    return values if values.dim() == 2 else values[:, None]
