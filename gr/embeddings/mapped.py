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
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gr.config import ComponentConfig
from gr.embeddings.row_updates import CHUNK_NUMBERS, Gradient, Piece, SparseGradient
from gr.embeddings.table import Table, TableSpec, filled_now, leaves, local_gradients, matrix
from gr.embeddings.view import Numbering, View
from gr.errors import UserError
from gr.processes import Processes


class MappedTable(Table):
    """``folder``: where the file lies (as large as the table, and its moments); a temporary one without it.  It is
    scratch, and removed at the end of the run: checkpoints hold the rows."""

    class Config(ComponentConfig):
        name: Literal["mapped"] = "mapped"
        folder: str | None = None

    has_cross_entropy = False

    def __init__(self, config: Config, spec: TableSpec, processes: Processes) -> None:
        self.spec, self.processes = spec, processes
        if processes.local.size != processes.world.size:
            raise UserError(
                "model.table mapped keeps its rows in the memory of one machine, and the run is on several: "
                "choose another table",
                everywhere=True,
            )
        self.folder = Path(processes.broadcast(processes.together(lambda: self._make_folder(config))))
        if processes.is_main:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._storage: dict[str, Tensor] = {}
        self.weight_ID = self.storage("weight", spec.dim)
        self.bias_I = self.storage("bias", 1)[:, 0] if spec.bias else None
        if filled_now():
            own = self.pieces()[0]
            for start, stop in own.chunks():
                own.values_RC[start:stop] = spec.first_rows(own.row0 + start, own.row0 + stop)
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

    # -- whose rows -----------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> list[int]:
        return self.processes.world.bounds(self.rows)

    @property
    def own_rows(self) -> range:
        return self.processes.world.own(self.rows)

    def pieces(self) -> list[Piece]:
        own = self.own_rows
        columns = {"weight": self.weight_ID} | ({} if self.bias_I is None else {"bias": self.bias_I})
        return [
            Piece(name, own.start, 0, matrix(values)[own.start : own.stop])
            for name, values in columns.items()
        ]

    def zeros(self, piece: Piece, moment: str, columns: int) -> Tensor:
        return self.storage(f"{moment}.{piece.column}", columns)[self.own_rows.start : self.own_rows.stop]

    # -- a step ---------------------------------------------------------------------------------------------------

    def view(self, wanted: Sequence[Tensor]) -> View:
        device = self.processes.device
        numbering = Numbering.of(wanted, self.rows, device)
        rows_U = numbering.rows_U.cpu()
        bias_U = None if self.bias_I is None else self.bias_I.index_select(0, rows_U).to(device)
        return leaves(self.weight_ID.index_select(0, rows_U).to(device), bias_U, numbering)

    def gather_gradients(self, view: View) -> list[Gradient]:
        assert view.numbering is not None
        world = self.processes.world
        rows_U = view.numbering.rows_U.cpu()
        counts = torch.searchsorted(rows_U, torch.tensor(self.bounds)).diff().tolist()
        rows, _ = world.exchange(rows_U, counts)
        gradients, _ = world.exchange(local_gradients(view).cpu(), counts)
        total = SparseGradient.summed(rows - self.own_rows.start, gradients)
        columns = total.values_UC.split([self.dim, 1], dim=1) if self.spec.bias else [total.values_UC]
        return [SparseGradient(total.rows_U, values_UC) for values_UC in columns]

    # -- the whole catalogue --------------------------------------------------------------------------------------

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.weight_ID[start:stop].to(self.processes.device)

    def biases(self, start: int, stop: int) -> Tensor:
        assert self.bias_I is not None
        return self.bias_I[start:stop].to(self.processes.device)

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
