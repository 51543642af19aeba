"""A table sharded by TorchRec: its planner and exchanges, our look-ups and updates between them.

A step asks each row once, in one exchange, and brings their gradients back in one more.  Whole-catalogue work is done
where the rows are: queries travel, tables don't.  Every process calls all of this together.

Shapes: B, T queries of this process, G queries of all, U rows of a view, I rows, D width, C rows of a chunk, W width as
stored: D, a bias's column, and what makes it divide evenly by columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from gr.config import ComponentConfig
from gr.embeddings import softmax
from gr.embeddings.local import LocalTable
from gr.embeddings.ranks import Excluded, Excluding, best_rows, count_above, ranks_from, target_scores
from gr.embeddings.row_updates import Gradient, Piece, SparseGradient
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec, leaves, local_gradients
from gr.embeddings.torchrec_plan import FEATURE, check_sharding, shard
from gr.embeddings.view import Numbering, View
from gr.processes import Processes


@dataclass(frozen=True)
class FetchedView(View):
    """``block_UW``: the rows as the exchange brought them, with the way back."""

    block_UW: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Shard:
    """Rows row0 ... and columns col0 ... of the table; values_RC is TorchRec's memory, leaf a parameter over it."""

    row0: int
    col0: int
    values_RC: Tensor
    leaf: nn.Parameter


class TorchRecTable(Table):
    class Config(ComponentConfig):
        """sharding: auto (by rows or whole, as the planner finds), table_wise, row_wise, column_wise, or data_parallel:
        whole on every process, the rows seen exchanged."""

        name: Literal["torchrec"] = "torchrec"
        sharding: Annotated[str, AfterValidator(check_sharding)] = "auto"

        def build(self, spec: TableSpec, processes: Processes, **runtime: Any) -> Table:
            if self.sharding == "data_parallel":
                return LocalTable(LocalTable.Config(), spec, processes)
            return TorchRecTable(self, spec, processes)

    def __init__(self, config: Config, spec: TableSpec, processes: Processes) -> None:
        self.spec, self.processes = spec, processes
        self.by_columns = config.sharding == "column_wise" and processes.world.size > 1
        width = spec.dim + spec.bias
        if self.by_columns:  # columns divide evenly
            width += -width % processes.world.size
        self.width = width
        self.module, self.plan = shard(spec, width, config.sharding, processes)
        self.shards = [
            Shard(*_place(config.local_metadata), weight.detach(), nn.Parameter(weight.detach()))
            for lookup in self.module._lookups
            for kernel in lookup._emb_modules
            for config, weight in zip(
                kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True
            )
        ]
        self.softmaxes: list[softmax.Contribution] = []
        self.of_columns: Tensor | None = None
        self._fill()

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return self.processes.world.size > 1

    def _fill(self) -> None:
        """First values, shard by shard in blocks of rows: a function of (seed, table, row, column) alone."""
        for held in self.shards:
            rows, columns = held.values_RC.shape
            held.values_RC.zero_()
            last = min(held.col0 + columns, self.dim)
            if last <= held.col0:
                continue
            block = max((1 << 22) // self.dim, 1)
            for start in range(0, rows, block):
                stop = min(start + block, rows)
                first = self.spec.first_rows(held.row0 + start, held.row0 + stop)
                held.values_RC[start:stop, : last - held.col0] = first[:, held.col0 : last]

    # -- a step ---------------------------------------------------------------------------------------------------

    def view(self, wanted: Sequence[Tensor]) -> View:
        numbering = Numbering.of(wanted, self.rows, self.processes.device)
        block_UW = self._fetch(numbering.rows_U)
        bias_U = block_UW[:, self.dim] if self.spec.bias else None
        fetched = leaves(block_UW[:, : self.dim].contiguous(), bias_U, numbering)
        return FetchedView(fetched.weight_UD, fetched.bias_U, numbering, block_UW)

    def _fetch(self, rows_U: Tensor) -> Tensor:
        """(U, W) the rows, wherever they are; differentiable in the shards' leaves."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        table = self.module
        asked = KeyedJaggedTensor(
            keys=[FEATURE], values=rows_U, lengths=torch.tensor([len(rows_U)], device=rows_U.device)
        )
        context = table.create_context()
        arrived = table.input_dist(context, asked).wait().wait()
        outs = []
        for ids, its_context in zip(arrived, context.sharding_contexts, strict=True):
            its_context.lengths_after_input_dist = ids.lengths().view(-1, ids.stride())
            if not self.shards:  # takes part in the exchange all the same, backward too
                outs.append(torch.empty(0, self.width, device=rows_U.device, requires_grad=True))
                continue
            parts = ids.values().chunk(len(self.shards)) if len(self.shards) > 1 else [ids.values()]
            outs.append(
                torch.cat(
                    [F.embedding(p, s.leaf, sparse=True) for p, s in zip(parts, self.shards, strict=True)]
                )
            )
        return table.output_dist(context, outs).wait()[FEATURE].values()

    def gather_gradients(self, view: View) -> list[Gradient]:
        assert isinstance(view, FetchedView)
        gradient = local_gradients(view)
        view.block_UW.backward(F.pad(gradient, (0, self.width - gradient.shape[1])))
        gradients: list[Gradient] = []
        softmaxes, self.softmaxes = self.softmaxes, []
        for held in self.shards:
            found, held.leaf.grad = held.leaf.grad, None
            if found is None:
                rows_U, values = (
                    torch.empty(0, dtype=torch.int64),
                    held.values_RC.new_zeros(0, held.values_RC.shape[1]),
                )
            else:
                found = found.coalesce()
                rows_U, values = found.indices()[0], found.values()
            for column, first, last in self._columns(held):
                sparse = SparseGradient(rows_U, values[:, first:last])
                if not softmaxes:
                    gradients.append(sparse)
                else:
                    gradients.append(softmax.SoftmaxGradient(self, held, column, sparse, softmaxes))
        if self.of_columns is not None:
            of_columns, self.of_columns = self.of_columns, None
            return [
                softmax.StoredGradient(gradient, of_columns[:, first:last])
                for gradient, (_, first, last) in zip(gradients, self._columns(self.shards[0]), strict=True)
            ]
        return gradients

    def cross_entropy(self, queries_TD: Tensor, targets_T: Tensor, scoring: Scoring) -> Tensor:
        return softmax.cross_entropy(self, queries_TD, targets_T, scoring)

    def pieces(self) -> list[Piece]:
        return [
            Piece(column, held.row0, held.col0 if column == "weight" else 0, held.values_RC[:, first:last])
            for held in self.shards
            for column, first, last in self._columns(held)
        ]

    def _columns(self, held: Shard) -> Iterator[tuple[str, int, int]]:
        """(column, its first and last place) of the table's columns that a shard holds."""
        stop = held.col0 + held.values_RC.shape[1]
        if held.col0 < self.dim:
            yield "weight", 0, min(self.dim, stop) - held.col0
        if self.spec.bias and held.col0 <= self.dim < stop:
            yield "bias", self.dim - held.col0, self.dim - held.col0 + 1

    # -- the whole catalogue: each process goes through rows of its own ------------------------------------------------

    def own_rows(self) -> range:
        """The rows that this process goes through when the catalogue is searched."""
        if self.by_columns:
            rank, size = self.processes.world.rank, self.processes.world.size
            return range(rank * self.rows // size, (rank + 1) * self.rows // size)
        if not self.shards:
            return range(0)
        return range(self.shards[0].row0, self.shards[0].row0 + len(self.shards[0].values_RC))

    def full_rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, W) some of this process's own rows, whole; by columns all processes call this together."""
        if not self.by_columns:
            first = self.own_rows().start
            if not self.shards:
                return torch.zeros(0, self.width, device=self.processes.device)
            return self.shards[0].values_RC[start - first : stop - first]
        world, mine = self.processes.world, self.shards[0].values_RC
        ranges = world.gather(torch.tensor([[start, stop]])).tolist()
        sent = torch.cat([mine[first:last] for first, last in ranges])
        counts = [last - first for first, last in ranges]
        arrived, _ = world.exchange(sent, counts)
        return torch.cat(arrived.split(stop - start) if stop > start else [arrived] * world.size, dim=1)

    def take_columns(self, start: int, stop: int, gradient_CW: Tensor) -> None:
        """The way back of ``full_rows`` by columns: gradients of whole rows go to who holds the columns, which keeps
        them until its shard moves (a tensor of the shard's size)."""
        world, mine = self.processes.world, self.shards[0].values_RC
        ranges = world.gather(torch.tensor([[start, stop]])).tolist()
        if self.of_columns is None:
            self.of_columns = torch.zeros_like(mine)
        sent = torch.cat(gradient_CW.chunk(world.size, dim=1))
        arrived, _ = world.exchange(sent, [stop - start] * world.size)
        for (first, last), part in zip(ranges, arrived.split([b - a for a, b in ranges]), strict=True):
            self.of_columns[first:last] += part

    def rows_in_step(self, size: int) -> Iterator[tuple[int, int]]:
        """This process's rows, (start, stop) a chunk of ``size`` at a time; everybody gets as many chunks, the last
        ones perhaps empty."""
        own = self.own_rows()
        most = max(self.processes.world.maximum([len(own)]))
        for start in range(0, most, size):
            yield min(own.start + start, own.stop), min(own.start + start + size, own.stop)

    def vectors(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop)[:, : self.dim]

    def biases(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop)[:, self.dim]

    def _rows(self, start: int, stop: int) -> Tensor:
        with torch.no_grad():
            return self._fetch(torch.arange(start, stop, device=self.processes.device))

    @torch.no_grad()
    def topk(
        self, queries_BD: Tensor, k: int, scoring: Scoring, exclude: Excluded | None = None
    ) -> tuple[Tensor, Tensor]:
        world, mine = self.processes.world, queries_BD.shape[0]
        queries_GD, exclude_G, first = self._of_all(queries_BD, exclude)
        scores_GK, rows_GK = best_rows(
            self._own_chunks(queries_GD, scoring, k), len(queries_GD), k, self.rows, exclude_G, queries_GD
        )
        short = min(k, self.rows) - scores_GK.shape[1]  # a process with fewer rows than k
        scores_GK = F.pad(scores_GK, (0, short), value=-torch.inf)
        rows_GK = F.pad(rows_GK, (0, short))
        scores = world.gather(scores_GK).view(world.size, len(queries_GD), -1)[:, first : first + mine]
        rows = world.gather(rows_GK).view(world.size, len(queries_GD), -1)[:, first : first + mine]
        best, place = scores.movedim(0, 1).flatten(1).topk(min(k, self.rows), dim=1)
        return best, rows.movedim(0, 1).flatten(1).gather(1, place)

    @torch.no_grad()
    def ranks(
        self, queries_BD: Tensor, targets_B: Tensor, scoring: Scoring, exclude: Excluded | None = None
    ) -> Tensor:
        world, mine = self.processes.world, len(targets_B)
        queries_GD, exclude_G, first = self._of_all(queries_BD, exclude)
        targets_G = world.gather(targets_B)
        excluding = None if exclude_G is None else Excluding(exclude_G, self.rows, keep=targets_G)
        bars_G = world.maximum_of(target_scores(self._own_chunks(queries_GD, scoring), targets_G))
        higher_G, equal_G = count_above(self._own_chunks(queries_GD, scoring), bars_G, targets_G, excluding)
        both = world.add_up(torch.stack([higher_G, equal_G]))
        return ranks_from(both[0], both[1], bars_G)[first : first + mine]

    @torch.no_grad()
    def scores(self, queries_BD: Tensor, scoring: Scoring) -> Tensor:
        raise TypeError("scores of all rows exist nowhere: ask for ranks or topk")

    def _own_chunks(
        self, queries_GD: Tensor, scoring: Scoring, at_least: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        size = max(at_least, min(self.chunk_rows(len(queries_GD)), (1 << 22) // self.width))
        for start, stop in self.rows_in_step(size):
            rows_CW = self.full_rows(start, stop)
            if stop > start:
                yield start, softmax.scores_of(queries_GD, rows_CW, self.dim, scoring)

    def _of_all(self, queries_BD: Tensor, exclude: Excluded | None) -> tuple[Tensor, Excluded | None, int]:
        """Everybody's queries and exclusions, and the place of the first of this process's."""
        world = self.processes.world
        queries_GD = world.gather(queries_BD)
        counts = world.gather(torch.tensor([queries_BD.shape[0]])).tolist()
        if exclude is not None:
            lengths_G = world.gather(exclude[0].diff())
            exclude = (F.pad(lengths_G.cumsum(0), (1, 0)), world.gather(exclude[1]))
        return queries_GD, exclude, sum(counts[: world.rank])


def _place(metadata: Any) -> tuple[int, int]:
    row0, col0 = metadata.shard_offsets
    return row0, col0
