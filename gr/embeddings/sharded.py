"""A table sharded by TorchRec: its planner and exchanges, our look-ups and updates between them.

A step asks each row once, in one exchange, and brings their gradients back in one more.  Whole-catalogue work is done
where the rows are: queries travel, tables don't.  Every process calls all of this together.

Shapes: B, T queries of this process, G queries of all, U rows of a view, I rows, D width, C rows of a chunk, W width as
stored: D, a bias's column, and what makes it divide evenly by columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional as F

from gr.config import ComponentConfig
from gr.embeddings import softmax
from gr.embeddings.exchange import Exchange, Shard
from gr.embeddings.fused import FusedRows, why_not
from gr.embeddings.local import LocalTable
from gr.embeddings.planned import PlannedTable, planned_cluster
from gr.embeddings.row_updates import Gradient, Maths, Piece, RowOptimizer, SparseGradient
from gr.embeddings.scoring import Scoring
from gr.embeddings.search import DealtTable
from gr.embeddings.table import Table, TableSpec, filled_now, leaves, local_gradients
from gr.embeddings.torchrec_plan import Wanted, check_sharding, plan, shard
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.processes import Processes


@dataclass(frozen=True)
class FetchedView(View):
    """``block_UW``: the rows as the exchange brought them, with the way back."""

    block_UW: Tensor | None = None


def check_dtype(dtype: str) -> str:
    """``fp32``; ValueError says why no other."""
    if dtype != "fp32":
        raise ValueError(
            "rows are float32: rounded to 16 bits at every step they would lose what is smaller than half of their "
            "last place, and no longer be a local table's; model.table.communication halves what is exchanged"
        )
    return dtype


class TorchRecTable(DealtTable):
    class Config(ComponentConfig):
        """sharding: auto (by rows or whole, as the planner finds), table_wise, row_wise, column_wise, or data_parallel:
        whole on every process, the rows seen exchanged.

        placement, of GPUs: in a device's own memory, or in the host's, perhaps with a cache on the device.  topology:
        the GPUs that a plan counts with, auto asks them.  kernel: whose code looks rows up and moves them, ``own`` or
        FBGEMM's (``fused``), which is refused where it isn't exactly the optimizer's maths; auto: fused on GPUs where
        it is, else own.  communication: what rows are rounded to while they travel in training; their gradients then
        to bfloat16."""

        name: Literal["torchrec"] = "torchrec"
        sharding: Annotated[str, AfterValidator(check_sharding)] = "auto"
        placement: Literal["device", "host", "cached"] = "device"
        topology: Literal["auto", "a100", "h100", "h200", "b200"] = "auto"
        kernel: Literal["auto", "own", "fused"] = "auto"
        communication: Literal["fp32", "bf16", "fp16"] = "fp32"
        dtype: Annotated[str, AfterValidator(check_dtype)] = "fp32"

        def idle(self) -> dict[str, str]:
            why = "sharding is data_parallel"
            keys = ("placement", "topology", "kernel", "communication")
            return dict.fromkeys(keys, why) if self.sharding == "data_parallel" else {}

        def build(self, spec: TableSpec, processes: Processes, **runtime: Any) -> Table:
            if self.sharding == "data_parallel":
                return LocalTable(LocalTable.Config(), spec, processes)
            if (on := planned_cluster(self.topology, processes.local.size)) is not None:
                return PlannedTable(spec, plan(spec, _width(spec, self, on.processes), self.wanted, on)[1])
            return TorchRecTable(self, spec, processes)

        @property
        def wanted(self) -> Wanted:
            return Wanted(self.sharding, self.placement)

    def __init__(self, config: Config, spec: TableSpec, processes: Processes) -> None:
        self.spec, self.processes = spec, processes
        self.by_columns = config.sharding == "column_wise" and processes.world.size > 1
        width = _width(spec, config, processes.world.size)
        self.fused = _is_fused(config, spec, width, processes)
        self.width = width + (
            -width % 4 if processes.device.type == "cuda" else 0
        )  # GPUs read numbers in fours
        module, self.plan = shard(
            spec,
            self.width,
            config.wanted,
            processes,
            config.topology,
            config.communication,
            spec.maths.twin if self.fused and spec.maths is not None else None,
        )
        self.exchange = Exchange(
            module,
            self.width,
            processes.device,
            alone=processes.world.size == 1,
            cached=config.placement == "cached",
            rounded=config.communication != "fp32",
        )
        self.shards = self.exchange.shards
        self.softmaxes: list[softmax.Contribution] = []
        self.of_columns: Tensor | None = None
        self._fill()

    def _fill(self) -> None:
        """First values, shard by shard in blocks of rows: a function of (seed, table, row, column) alone."""
        for held in self.shards:
            rows, columns = held.values_RC.shape
            wide = max(min(held.col0 + columns, self.dim) - held.col0, 0)
            held.values_RC[:, wide:].zero_()  # the bias, and what makes a row longer
            if not wide or not filled_now():
                continue
            block = max((1 << 22) // self.dim, 1)
            for start in range(0, rows, block):
                stop = min(start + block, rows)
                first = self.spec.first_rows(held.row0 + start, held.row0 + stop)
                held.values_RC[start:stop, :wide] = first[:, held.col0 : held.col0 + wide]
        self.refilled()

    def refilled(self) -> None:
        self.exchange.refilled()

    # -- a step ---------------------------------------------------------------------------------------------------

    def view(self, wanted: Sequence[Tensor]) -> View:
        numbering = Numbering.of(wanted, self.rows, self.processes.device)
        block_UW = self.exchange.fetch(numbering.rows_U)
        bias_U = block_UW[:, self.dim] if self.spec.bias else None
        fetched = leaves(block_UW[:, : self.dim].contiguous(), bias_U, numbering)
        return FetchedView(fetched.weight_UD, fetched.bias_U, numbering, block_UW)

    def row_optimizer(self, maths: Maths, param_groups: list[dict[str, Any]]) -> RowOptimizer:
        if not self.fused:
            return super().row_optimizer(maths, param_groups)
        kernels = [kernel.emb_module for kernel in self.exchange.kernels]
        return FusedRows(self.name, self.pieces(), maths, param_groups, self.zeros, kernels=kernels)

    def gather_gradients(self, view: View) -> list[Gradient]:
        assert isinstance(view, FetchedView) and view.numbering is not None and view.block_UW is not None
        gradient = local_gradients(view)
        padded = F.pad(gradient, (0, self.width - gradient.shape[1]))
        if self.exchange.alone:
            brought = [(view.numbering.rows_U, padded)]
        else:
            brought = self.exchange.bring(view.block_UW, padded)
        gradients: list[Gradient] = []
        softmaxes, self.softmaxes = self.softmaxes, []
        for held, (rows_U, values) in zip(self.shards, brought, strict=True):
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
        assert not self.fused  # the spec said that nothing of this kind comes
        return softmax.cross_entropy(self, queries_TD, targets_T, scoring)

    def pieces(self) -> list[Piece]:
        self.exchange.settle()
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
            return self.exchange.fetch(torch.arange(start, stop, device=self.processes.device))

    def own_chunks(
        self, queries_GD: Tensor, scoring: Scoring, at_least: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        self.exchange.settle()
        size = max(at_least, min(self.chunk_rows(len(queries_GD)), (1 << 22) // self.width))
        for start, stop in self.rows_in_step(size):
            rows_CW = self.full_rows(start, stop)
            if stop > start:
                yield start, softmax.scores_of(queries_GD, rows_CW, self.dim, scoring)


def _width(spec: TableSpec, config: TorchRecTable.Config, processes: int) -> int:
    """W, on a CPU."""
    width = spec.dim + spec.bias
    if config.sharding == "column_wise" and processes > 1:
        # TorchRec cuts columns into fours, evenly, or else not at all and says nothing
        width += -width % (4 * processes)
    return width


def _is_fused(config: TorchRecTable.Config, spec: TableSpec, width: int, processes: Processes) -> bool:
    """Whether FBGEMM's kernels move the rows; UserError where they can't and nothing else is asked for."""
    device = processes.device
    if config.placement != "device" and device.type == "cpu":
        raise UserError(
            f"model.table.placement={config.placement} is about where a GPU's table lies, and this run is on CPUs, "
            "whose memory is the host's: leave it out",
            everywhere=True,
        )
    why = why_not(spec, width, device) if config.kernel != "own" else "kernel is own"
    if why is None:
        return config.kernel == "fused" or device.type == "cuda"
    if config.kernel == "fused":
        raise UserError(f"model.table.kernel=fused can't be had: {why}; use kernel=own", everywhere=True)
    if config.placement == "cached":
        raise UserError(
            f"model.table.placement=cached needs FBGEMM's own kernels, and they can't be had: {why}; "
            "use placement=host",
            everywhere=True,
        )
    return False
