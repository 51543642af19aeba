"""What is compared when a step is shared out: where the table's rows are, and the engine of the dense part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TABLES = {
    "local": "model.table=local",
    **{
        sharding: f"model.table={{name: torchrec, sharding: {sharding}}}"
        for sharding in ("row_wise", "column_wise", "table_wise")
    },
}
ENGINES = {
    "ddp": "train.engine=ddp",
    **{f"zero{stage}": f"train.engine={{name: deepspeed, zero: {stage}}}" for stage in (1, 2, 3)},
    "fsdp": "train.engine=fsdp",
}


@dataclass(frozen=True)
class Case:
    table: str
    engine: str

    @property
    def name(self) -> str:
        return f"{self.table}, {self.engine}"

    @property
    def overrides(self) -> list[str]:
        return [TABLES[self.table], ENGINES[self.engine]]


def cases(tables: Sequence[str], engines: Sequence[str], every: bool, processes: int) -> list[Case]:
    """Every table under the first engine, and the second table (the first, if there is one only) under the other
    engines; all pairs with ``every``.  The shardings of one process are one, of which the first stands for all."""
    if processes == 1:
        sharded = [table for table in tables if table != "local"]
        tables = [table for table in tables if table == "local" or table in sharded[:1]]
    if every:
        return [Case(table, engine) for engine in engines for table in tables]
    first, *others = engines
    return [Case(table, first) for table in tables] + [Case(tables[:2][-1], engine) for engine in others]
