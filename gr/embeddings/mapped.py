"""A table in memory-mapped host memory: larger than a GPU, or than the memory of a process; a step fetches the rows
that it needs.

The processes of one machine map the same file.  Each owns a stretch of the rows: it fills them, gathers their gradients
from everybody and moves them; everybody reads all rows.

Shapes: B, T queries, U rows of a view, I rows, D width, C rows of a chunk.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gr.config import ComponentConfig
from gr.embeddings.row_updates import RowGradients
from gr.embeddings.scoring import Scoring
from gr.embeddings.table import Table, TableSpec
from gr.embeddings.view import Numbering, View, gradient_of
from gr.errors import UserError
from gr.processes import Processes
from gr_kernels.candidate_scores import candidate_scores

CHUNK_NUMBERS = 1 << 22  # values of a chunk of rows that are touched at once: 16 MiB


class MappedTable(Table):
    """``folder``: where the file lies (as large as the table, and its moments); a temporary one without it.  It is
    scratch, and removed at the end of the run: checkpoints hold the rows."""

    class Config(ComponentConfig):
        name: Literal["mapped"] = "mapped"
        folder: str | None = None

    whole = False
    dense = False
    has_cross_entropy = False

    def __init__(self, config: Config, spec: TableSpec, processes: Processes) -> None:
        self.spec, self.processes = spec, processes
        if processes.local.size != processes.world.size:
            raise UserError(
                "model.table mapped keeps its rows in the memory of one machine, and the run is on several: "
                "choose another table",
                everywhere=True,
            )
        if spec.rows < processes.world.size:
            raise UserError(
                f"model.table mapped can't deal the {spec.rows} rows of '{spec.name}' to {processes.world.size} "
                "processes: use model.table=local",
                everywhere=True,
            )
        self.folder = Path(processes.broadcast(processes.together(lambda: self._make_folder(config))))
        if processes.is_main:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._storage: dict[str, Tensor] = {}
        self.weight_ID = self.storage("weight", spec.dim)
        self.bias_I = self.storage("bias", 1)[:, 0] if spec.bias else None
        for start, stop in self.own_chunks():
            self.weight_ID[start:stop] = spec.first_rows(start, stop)
        processes.barrier()

    def storage(self, name: str, width: int) -> Tensor:
        """(I, width) float32 zeros at first, in a file of the table's folder that all processes map."""
        if name not in self._storage:
            file, numbers = self.folder / name, self.rows * width
            if self.processes.is_main:
                with file.open("wb") as out:
                    out.truncate(4 * numbers)  # a sparse file: what nobody touched takes no room
            self.processes.barrier()
            mapped = torch.from_file(str(file), shared=True, size=numbers, dtype=torch.float32)
            self._storage[name] = mapped.view(self.rows, width)
        return self._storage[name]

    def columns(self) -> dict[str, Tensor]:
        return {"weight": self.weight_ID} | ({} if self.bias_I is None else {"bias": self.bias_I})

    # -- whose rows -----------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> list[int]:
        """Rank r owns the rows from ``bounds[r]`` to ``bounds[r + 1]`` (exclusive)."""
        ranks = self.processes.world.size
        return [rank * self.rows // ranks for rank in range(ranks + 1)]

    @property
    def own_rows(self) -> range:
        rank = self.processes.world.rank
        return range(self.bounds[rank], self.bounds[rank + 1])

    def own_chunks(self) -> Iterator[tuple[int, int]]:
        """This process's rows, a chunk at a time."""
        step = max(CHUNK_NUMBERS // self.dim, 1)
        for start in range(self.own_rows.start, self.own_rows.stop, step):
            yield start, min(start + step, self.own_rows.stop)

    # -- a step ---------------------------------------------------------------------------------------------------

    def view(self, wanted: Sequence[Tensor]) -> View:
        device = self.processes.device
        numbering = Numbering.of(wanted or [torch.empty(0, dtype=torch.int64, device=device)], self.rows)
        rows_U = numbering.rows_U.cpu()
        weight_UD = self.weight_ID.index_select(0, rows_U).to(device).requires_grad_()
        bias_U = None
        if self.bias_I is not None:
            bias_U = self.bias_I.index_select(0, rows_U).to(device).requires_grad_()
        return View(weight_UD, bias_U, numbering)

    def gather_gradients(self, view: View) -> RowGradients:
        """The gradients of this process's rows, summed over everybody's views; all processes call this together, and
        when it returns nobody reads the rows any more."""
        assert view.numbering is not None
        world = self.processes.world
        rows_U = view.numbering.rows_U.cpu()
        columns = [gradient_of(view.weight_UD)]
        if view.bias_U is not None:
            columns.append(gradient_of(view.bias_U)[:, None])
        ends = torch.searchsorted(rows_U, torch.tensor(self.bounds))
        counts = ends.diff().tolist()
        rows, _ = world.exchange(rows_U, counts)
        gradients, _ = world.exchange(torch.cat(columns, dim=1).cpu(), counts)
        return RowGradients.summed(rows, gradients, self.dim)

    # -- the whole catalogue --------------------------------------------------------------------------------------

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.weight_ID[start:stop].to(self.processes.device)

    def biases(self, start: int, stop: int) -> Tensor:
        assert self.bias_I is not None
        return self.bias_I[start:stop].to(self.processes.device)

    def chunk_scores(self, queries_BD: Tensor, start: int, stop: int, scoring: Scoring) -> Tensor:
        scores_BC = candidate_scores(
            queries_BD * scoring.scale,
            self.vectors(start, stop),
            range(stop - start),
            normalize_eps=scoring.normalize_eps,
        )
        return scores_BC + self.biases(start, stop) if scoring.bias else scores_BC

    def chunk_rows(self, queries: int) -> int:
        return min(
            super().chunk_rows(queries), max(CHUNK_NUMBERS // self.dim, 1)
        )  # they are copied to the device

    # -- its folder -----------------------------------------------------------------------------------------------

    def _make_folder(self, config: Config) -> str:
        if not self.processes.is_main:
            return ""
        try:
            return tempfile.mkdtemp(prefix=f"gr-table-{self.name}-", dir=config.folder)
        except OSError as error:
            raise UserError(
                f"model.table.folder '{config.folder or tempfile.gettempdir()}' can't be written to "
                f"({error.strerror}): choose another one"
            ) from None
