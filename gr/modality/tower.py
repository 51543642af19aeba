"""A tower: a table of items whose rows are formed from their content, and perhaps from a row of an id as well.

What stands in a :class:`gr.embeddings.table.Table` is asked of a tower the same way.  A step's view is formed once, of
the distinct rows that its micro-batches look at; micro-batches leave their gradients at it, and :meth:`Tower.take_back`
sends them on when the last one has been.  For evaluation the whole catalogue is formed once, until parameters move.

Where a table of ids lies on several processes (``model.table``), so does everything else that has a row an item
(:class:`DealtTower`).

Shapes: T queries, G queries of all processes, U rows of a view, I rows, R of them on this process, C of a chunk, D
width, E width of content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from gr.embeddings.row_updates import Piece
from gr.embeddings.scoring import Scoring
from gr.embeddings.search import DealtTable
from gr.embeddings.shares import Shares
from gr.embeddings.table import Array, Table, TableSpec, leaves
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.modality.collapse import effective_rank, mean_cosine, sample
from gr.modality.content import Content
from gr.modality.digest import Sketch
from gr.modality.head import Fusion, Head, initialise
from gr.modes import evaluating
from gr.processes import Processes
from gr_kernels.candidate_scores import candidate_scores
from gr_kernels.log_partition import cross_entropy

ROWS_AT_ONCE = 1 << 14
"""Rows that are formed at a time for an evaluation."""


class Given(Table):
    """Rows that are searched and nothing else: (I, D) as they are given."""

    def __init__(self, name: str, vectors_ID: Tensor) -> None:
        self.vectors_ID = vectors_ID
        self.spec = TableSpec(name, len(vectors_ID), vectors_ID.shape[1], 0.0, 0)

    def view(self, wanted: Sequence[Tensor] = ()) -> View:
        return View(self.vectors_ID)

    def pieces(self) -> list[Piece]:
        return []

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.vectors_ID[start:stop]

    def biases(self, start: int, stop: int) -> Tensor:
        raise TypeError("given rows have no bias column")


class Tower(Table, nn.Module):
    """head(content), fused with the rows of a table of ``ids`` where ``fusion`` says so.

    Its parameters have dense gradients and are on every process.  ``named_parameters`` are those that train: what is
    frozen stays as it came, and is in no optimiser and no checkpoint.  The ids' are their table's, which stands beside
    the tower (``beneath``) and moves as it always does.
    """

    initialises_itself = True
    formed = True

    def __init__(
        self,
        spec: TableSpec,
        content: Content,
        head: Head,
        processes: Processes,
        fusion: Fusion | None = None,
        ids: Table | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if spec.bias:
            raise UserError(
                "model.similarity.item_bias is a number for each row of a table, and model.item_tower forms its rows: "
                "use item_bias=false, or model.item_tower=id"
            )
        self.spec, self.processes, self.content = spec, processes, content
        self.dense = True
        self.whole = not spec.apart  # a softmax over all looks at every row
        self.beneath = () if ids is None else (ids,)  # in a tuple: not a part of the module
        self.head, self.fusion = head, fusion
        initialise(head, spec.seed, f"tables.{spec.name}.head")
        if fusion is not None:
            initialise(fusion, spec.seed, f"tables.{spec.name}.fusion")
        if content.encoder is not None:
            self.encoder = content.encoder
        self._formed_UD: Tensor | None = None
        self._content_UE: Tensor | None = None
        self._leaf_ID: Tensor | None = None
        self._catalogue: tuple[list[int], Tensor] | None = None

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return self.content.collective or any(table.collective for table in self.beneath)

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        named = nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def named_shared(self, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        return ((prefix + name, parameter) for name, parameter in nn.Module.named_parameters(self))

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin(self, step: int, batch: Sequence[Tensor]) -> None:
        """Before the views of a step: its number, the run's first being 0, and the rows of its sequences and targets
        (tensors of any shape); others are candidates alone."""
        self.content.begin(step, batch)

    def views(self, wanted: Sequence[Tensor] = ()) -> dict[str, View]:
        """The rows that a step needs, formed, and the ids' that they are formed from; without gradients (an evaluation)
        rows as they are kept for it."""
        if not torch.is_grad_enabled():
            return {self.name: self.kept_view(wanted)}
        self.forget()
        device = self.head.first.weight.device
        numbering = None
        rows_U = torch.arange(self.rows, device=device)
        if not self.whole:
            numbering = Numbering.of(wanted, self.rows, device)
            rows_U = numbering.rows_U.to(device)
        content_UE = self.content.of_step(rows_U).detach().requires_grad_(self.content.learns)
        beneath = {table.name: table.view([rows_U]) for table in self.beneath}
        return self.form(content_UE, rows_U, numbering, beneath)

    def form(
        self, content_UE: Tensor, rows_U: Tensor, numbering: Numbering | None, beneath: dict[str, View]
    ) -> dict[str, View]:
        """The view of ``rows_U`` (all, where nothing is numbered) with that content, over views of the ids' rows."""
        self._content_UE = content_UE
        id_UD = next((_rows_of(view, rows_U) for view in beneath.values()), None)
        self._formed_UD = self._fused(id_UD, self._content_UE)
        learns = self._formed_UD.requires_grad
        if numbering is None:
            self._leaf_ID = self._formed_UD.detach().requires_grad_(learns)
            return {self.name: View(self._leaf_ID), **beneath}
        if not learns:
            return {self.name: View(self._formed_UD, None, numbering), **beneath}
        return {self.name: leaves(self._formed_UD, None, numbering), **beneath}

    def view(self, wanted: Sequence[Tensor] = ()) -> View:
        return self.views(wanted)[self.name]

    def take_back(self, view: View) -> None:
        """Send the gradients that a step's micro-batches left at its ``view`` to what formed it; every process of the
        run calls this together, after the last backward pass.  All parameters have a gradient afterwards: what an
        optimiser has moved once it moves always."""
        gradient_UE = self.unform(view)
        if self.content.learns:
            if gradient_UE is None:
                gradient_UE = view.weight_UD.new_zeros(len(view.weight_UD), self.content.width)
            self.content.take_back(gradient_UE)
        dense = [table.parameters() for table in self.beneath if isinstance(table, nn.Module) and table.dense]
        for parameter in chain(self.parameters(), *dense):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def unform(self, view: View) -> Tensor | None:
        """(U, E) the gradient of the content, if it has one, from what micro-batches left at its ``view``: through
        head, fusion and ids, which have theirs then."""
        formed_UD, content_UE = self._formed_UD, self._content_UE
        assert formed_UD is not None and content_UE is not None, "a view's gradients come back once"
        self._formed_UD = self._content_UE = self._leaf_ID = None
        gradient_UD = view.weight_UD.grad
        if gradient_UD is not None:
            formed_UD.backward(gradient_UD)
        return content_UE.grad

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        assert self._leaf_ID is not None, "a view of all rows comes first"
        return cross_entropy(
            queries_TD,
            scoring.columns(self._leaf_ID),
            targets_T,
            scale=scoring.scale,
            normalize_eps=scoring.normalize_eps,
        )

    def _fused(self, id_UD: Tensor | None, content_UE: Tensor) -> Tensor:
        """(U, D) of rows with that content and these vectors of their ids; without them, of items that have no id."""
        content_UD = self.head(content_UE)
        if self.fusion is None:
            return content_UD
        return self.fusion(torch.zeros_like(content_UD) if id_UD is None else id_UD, content_UD)

    # -- the whole catalogue --------------------------------------------------------------------------------------

    def catalogue(self) -> Tensor:
        """(I, D) all rows as they are now, without gradients, formed anew where a parameter has moved."""
        return self._kept(self.content.all, range(self.rows))

    def forget(self) -> None:
        """What is kept for evaluations: something is about to move."""
        self._catalogue = None

    def kept_view(self, wanted: Sequence[Tensor]) -> View:
        """What an evaluation looks rows up in."""
        return View(self.catalogue())

    def _kept(self, content: Callable[[], Tensor], rows: range) -> Tensor:
        """(len(rows), D) ``rows`` as they are now, formed again where a parameter has moved."""
        moved = self._moved()
        if self._catalogue is None or self._catalogue[0] != moved:
            with evaluating(self):
                self._catalogue = moved, self._formed(content(), rows)
        return self._catalogue[1]

    def _moved(self) -> list[int]:
        """What is another list when a parameter, or a row of an id, has moved."""
        pieces = [piece for table in self.beneath for piece in table.pieces()]
        return [values._version for values in (*self.parameters(), *(piece.values_RC for piece in pieces))]

    def _formed(self, content_RE: Tensor, rows: range) -> Tensor:
        """(R, D) of ``rows`` with that content, a chunk at a time; as many chunks on every process where ids come from
        others."""
        if not self.beneath:
            return self.head(content_RE)
        formed = [torch.empty(0, self.dim, device=content_RE.device)]
        most = len(rows)
        if self.beneath[0].collective:
            (most,) = self.processes.world.maximum([most])
        for first in range(0, most, ROWS_AT_ONCE):
            start, stop = (min(first + more, len(rows)) for more in (0, ROWS_AT_ONCE))
            id_CD = self.beneath[0].vectors(rows.start + start, rows.start + stop)
            formed.append(self._fused(id_CD, content_RE[start:stop]))
        return torch.cat(formed)

    def unseen(self, items: pa.Table) -> Given:
        """A table of items that no row stands for, formed by their columns: where ids are fused, theirs are zeros."""
        with evaluating(self):
            content_UE = self.content.unseen(items).to(self.head.first.weight.device)
            return Given(f"unseen {self.name}", self._fused(None, content_UE))

    def kept_rows(self, rows_n: Tensor) -> Tensor:
        """(n, D) of distinct rows in ascending order, out of all as they are kept for evaluations."""
        return self.catalogue().index_select(0, rows_n)

    def watched(self) -> dict[str, float]:
        """What tells whether rows have collapsed, of a sample of them; every process calls this together.  Where no
        evaluation has formed all rows since some moved, the sample's are formed alone."""
        rows_n = sample(self.rows).to(self.head.first.weight.device)
        if self._catalogue is not None and self._catalogue[0] == self._moved():
            vectors_nD = self.kept_rows(rows_n)
        else:
            with evaluating(self):
                content_nE = self.content.some(rows_n)
                ids = [_rows_of(table.view([rows_n]), rows_n) for table in self.beneath]
                vectors_nD = self._fused(next(iter(ids), None), content_nE)
        return {"item_cosine": mean_cosine(vectors_nD), "item_rank": effective_rank(vectors_nD)}

    def pieces(self) -> list[Piece]:
        """None: it owns parameters, and no rows."""
        return []

    def outside_digest(self) -> str:
        return self.content.outside_digest()

    def encoder_digest(self) -> str:
        return self.content.encoder_digest()

    def made_of(self) -> dict[str, str]:
        return self.content.made_of()

    def sketch(self, rows: int | None = None) -> Sketch | None:
        return self.content.sketch(rows)

    def state(self) -> dict[str, Array]:
        return self.content.state()

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.catalogue()[start:stop]

    def biases(self, start: int, stop: int) -> Tensor:
        raise TypeError("a tower has no bias column")

    def extra_repr(self) -> str:
        return f"{self.name!r}, rows={self.rows}, dim={self.dim}"


def _rows_of(view: View, rows_U: Tensor) -> Tensor:
    """(U, D) of distinct rows in ascending order: as many as there are is all of them."""
    return view.weight_UD if len(rows_U) == len(view.weight_UD) else view.lookup(rows_U)


class DealtTower(Tower, DealtTable):
    """A tower of which each process forms and searches a stretch of the rows, and which has no softmax over all: no
    process ever holds vectors of every item."""

    has_cross_entropy = False
    collective = DealtTable.collective  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.whole = False

    def catalogue(self) -> Tensor:
        raise TypeError("a row of every item exists nowhere: each process has a stretch of them")

    def kept(self) -> Shares:
        """The rows as they are now, a stretch on each process, which all form together."""
        world = self.processes.world
        return Shares(self.rows, self._kept(self.content.own, world.own(self.rows)), world)

    def kept_view(self, wanted: Sequence[Tensor]) -> View:
        numbering = Numbering.of(wanted, self.rows, self.head.first.weight.device)
        return View(self.kept().fetch(numbering.rows_U), None, numbering)

    def own_chunks(
        self, queries_GD: Tensor, scoring: Scoring, at_least: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        kept = self.kept()
        own_RD = scoring.columns(kept.own_RE)
        size = max(at_least, self.chunk_rows(len(queries_GD)))
        for start in range(0, len(kept.own), size):
            scores_GC = candidate_scores(
                queries_GD * scoring.scale,
                own_RD,
                range(start, min(start + size, len(kept.own))),
                normalize_eps=scoring.normalize_eps,
            )
            yield kept.own.start + start, scores_GC

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.kept().fetch(torch.arange(start, stop, device=self.head.first.weight.device))

    def kept_rows(self, rows_n: Tensor) -> Tensor:
        return self.kept().fetch(rows_n)
