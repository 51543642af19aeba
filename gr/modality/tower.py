"""A tower: a table of items whose rows are formed from their content, and perhaps from a row of an id as well.

What stands in a :class:`gr.embeddings.table.Table` is asked of a tower the same way.  A step's view is formed once, of
the distinct rows that its micro-batches look at; micro-batches leave their gradients at it, and :meth:`Tower.take_back`
sends them on when the last one has been.  For evaluation the whole catalogue is formed once, until parameters move.

Shapes: T queries, U rows of a view, I rows, D width, E width of content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn

from gr.embeddings.row_updates import Piece
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec, leaves
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.modality.collapse import effective_rank, mean_cosine, sample
from gr.modality.content import Content
from gr.modality.head import Fusion, Head, initialise
from gr.modes import evaluating
from gr.processes import Processes
from gr_kernels.log_partition import cross_entropy


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
    """head(content), fused with a table of ids where ``fusion`` says so.

    Its parameters have dense gradients and are on every process.  ``named_parameters`` are those that train: what is
    frozen stays as it came, and is in no optimiser and no checkpoint.
    """

    initialises_itself = True
    formed = True

    def __init__(
        self, spec: TableSpec, content: Content, head: Head, fusion: Fusion | None, processes: Processes
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
        self.collective = content.collective
        self.head, self.fusion = head, fusion
        initialise(head, spec.seed, f"tables.{spec.name}.head")
        self.ids: nn.Parameter | None = None
        if fusion is not None:
            initialise(fusion, spec.seed, f"tables.{spec.name}.fusion")
            self.ids = nn.Parameter(spec.first_rows(0, spec.rows))
        if content.encoder is not None:
            self.encoder = content.encoder
        self._formed_UD: Tensor | None = None
        self._content_UE: Tensor | None = None
        self._leaf_ID: Tensor | None = None
        self._catalogue: tuple[list[int], Tensor] | None = None

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        named = nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def named_shared(self, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        named = nn.Module.named_parameters(self)
        return ((prefix + name, parameter) for name, parameter in named if parameter is not self.ids)

    # -- a step ---------------------------------------------------------------------------------------------------

    def view(self, wanted: Sequence[Tensor] = ()) -> View:
        """The rows that a step needs, formed; without gradients (an evaluation) the whole catalogue."""
        if not torch.is_grad_enabled():
            return View(self.catalogue())
        self._catalogue = None
        device = self.head.first.weight.device
        numbering = None
        rows_U = torch.arange(self.rows, device=device)
        if not self.whole:
            numbering = Numbering.of(wanted, self.rows, device)
            rows_U = numbering.rows_U.to(device)
        self._content_UE = self.content.of_step(rows_U).detach().requires_grad_(self.content.learns)
        self._formed_UD = self._fused(rows_U, self._content_UE)
        learns = self._formed_UD.requires_grad
        if numbering is None:
            self._leaf_ID = self._formed_UD.detach().requires_grad_(learns)
            return View(self._leaf_ID)
        if not learns:
            return View(self._formed_UD, None, numbering)
        return leaves(self._formed_UD, None, numbering)

    def take_back(self, view: View) -> None:
        """Send the gradients that a step's micro-batches left at its ``view`` to what formed it; every process of the
        run calls this together, after the last backward pass.  All parameters have a gradient afterwards: what an
        optimiser has moved once it moves always."""
        formed_UD, content_UE = self._formed_UD, self._content_UE
        assert formed_UD is not None and content_UE is not None, "a view's gradients come back once"
        self._formed_UD = self._content_UE = self._leaf_ID = None
        gradient_UD = view.weight_UD.grad
        if gradient_UD is not None:
            formed_UD.backward(gradient_UD)
        if self.content.learns:
            nothing = torch.zeros_like(content_UE)
            self.content.take_back(nothing if content_UE.grad is None else content_UE.grad)
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        assert self._leaf_ID is not None, "a view of all rows comes first"
        return cross_entropy(
            queries_TD,
            scoring.columns(self._leaf_ID),
            targets_T,
            scale=scoring.scale,
            normalize_eps=scoring.normalize_eps,
        )

    def _fused(self, rows_U: Tensor | None, content_UE: Tensor) -> Tensor:
        """(U, D) of the rows with that content; without rows of items that have no id."""
        content_UD = self.head(content_UE)
        if self.fusion is None:
            return content_UD
        assert self.ids is not None
        id_UD = torch.zeros_like(content_UD) if rows_U is None else self.ids.index_select(0, rows_U)
        return self.fusion(id_UD, content_UD)

    # -- the whole catalogue --------------------------------------------------------------------------------------

    def catalogue(self) -> Tensor:
        """(I, D) all rows as they are now, without gradients, formed anew where a parameter has moved."""
        moved = [parameter._version for parameter in self.parameters()]
        if self._catalogue is None or self._catalogue[0] != moved:
            with evaluating(self):
                content_IE = self.content.all()
                rows_I = torch.arange(self.rows, device=content_IE.device)
                self._catalogue = moved, self._fused(rows_I, content_IE)
        return self._catalogue[1]

    def unseen(self, items: pa.Table) -> Given:
        """A table of items that no row stands for, formed by their columns: where ids are fused, theirs are zeros."""
        with evaluating(self):
            content_UE = self.content.unseen(items).to(self.head.first.weight.device)
            return Given(f"unseen {self.name}", self._fused(None, content_UE))

    def watched(self) -> dict[str, float]:
        """What tells whether rows have collapsed, of a sample of them; every process calls this together."""
        rows_n = sample(self.rows).to(self.head.first.weight.device)
        vectors_nD = self.catalogue().index_select(0, rows_n)
        return {"item_cosine": mean_cosine(vectors_nD), "item_rank": effective_rank(vectors_nD)}

    def pieces(self) -> list[Piece]:
        """None: it owns parameters, and no rows."""
        return []

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.catalogue()[start:stop]

    def biases(self, start: int, stop: int) -> Tensor:
        raise TypeError("a tower has no bias column")

    def extra_repr(self) -> str:
        return f"{self.name!r}, rows={self.rows}, dim={self.dim}"
