"""What a tower is built with: what the run knows of its items, and where it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from gr.config import ComponentConfig
from gr.embeddings.table import TableSpec
from gr.processes import Processes


class Described(Protocol):
    """What a tower reads of the catalogue: raw ids and columns of its items, and what is kept beside the dataset."""

    @property
    def rows(self) -> int: ...

    @property
    def column_names(self) -> Iterable[str]: ...

    def column(self, name: str) -> Any:
        """A pyarrow.ChunkedArray."""
        ...

    def kept(self, kind: str, about: dict[str, Any]) -> Any | None:
        """What :meth:`keep` was given under the same description, if it is still whole."""
        ...

    def keep(self, kind: str, about: dict[str, Any], table: Any) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What a tower is built with: what the table is, its kind (``model.table``), the items, the processes, and whether
    steps compute in bfloat16."""

    spec: TableSpec
    table: ComponentConfig
    catalogue: Described
    processes: Processes
    bf16: bool = False
    by_rows: bool = False
    """Whether the optimiser moves the rows seen of a table, and no others."""
