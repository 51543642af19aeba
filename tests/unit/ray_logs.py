"""What the workers of a test's Ray cluster import: steps that fail, and datasets of Ray Data."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gr.data.making.ray_steps import ReadPart
from gr.data.making.ray_tasks import Result

ROWS = 3000


@dataclass(frozen=True)
class Killed(ReadPart):
    """Kills its own process after the work on part 2, the first time."""

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        result = super().__call__(aside, number, given)
        marker = Path(self.out).with_name("was-killed")
        if number == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@dataclass(frozen=True)
class Full(ReadPart):
    """Finds a full disk at part 2."""

    def __call__(self, aside: Path, number: int, given: Any) -> Result:
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(aside / "actions.arrow"))
        return super().__call__(aside, number, given)


def columns() -> dict[str, np.ndarray]:
    """A log in which nearly all times are tied."""
    r = np.random.default_rng(11)
    return {
        "u": r.integers(0, 60, ROWS),
        "i": r.integers(0, 40, ROWS),
        "t": r.integers(0, 3, ROWS),
    }


def tied():
    """Blocks of many sizes, one of them empty, in the order of the log."""
    import ray.data

    table = pa.table(columns())
    cuts = [0, 7, 7, 900, 1000, 2500, ROWS]
    return ray.data.from_arrow([table.slice(a, b - a) for a, b in zip(cuts, cuts[1:])])


def mapped():
    """The same log made by tasks, as pandas' frames, of which the earlier ones take longer."""
    import time

    import ray.data

    table = pa.table(columns())

    def rows(batch):
        first = int(batch["id"][0])
        time.sleep(0.2 if first < ROWS // 2 else 0)
        return table.take(batch["id"]).to_pandas()

    return ray.data.range(ROWS, override_num_blocks=6).map_batches(rows, batch_format="numpy")


def united():
    """The same log of blocks that differ in the order and the widths of their columns."""
    import ray.data

    table = pa.table(columns())
    narrow = pa.schema([("u", pa.int32()), ("i", pa.uint8()), ("t", pa.int16())])
    others = [table.slice(900, 900).cast(narrow).select(["t", "u", "i"]), table.slice(1800, 0)]
    floats = table.slice(1800).to_pandas().astype({"t": "float64", "u": "Int64"})
    first = ray.data.from_arrow(table.slice(0, 900))
    return first.union(*map(ray.data.from_arrow, others), ray.data.from_pandas(floats))


def _with_a_later(**columns):
    import ray.data

    whole = {"u": [1], "i": [2], "t": [3]}
    return ray.data.from_arrow(pa.table(whole)).union(ray.data.from_arrow(pa.table(whole | columns)))


def lists_later():
    return _with_a_later(u=[[1, 2]])


def moments_later():
    return _with_a_later(t=pa.array([3], pa.timestamp("s")))


def without_rows():
    import ray.data

    return ray.data.from_arrow(pa.table(columns()).slice(0, 0))


def with_bad_rows():
    import ray.data

    good = pa.table({"u": ["1", "2"], "i": ["7", "8"], "t": [1, 2]})
    return ray.data.from_arrow([good, pa.table({"u": ["3", None], "i": ["7", "8"], "t": [1, 2]})])


def no_dataset():
    return 3


NOT_A_FUNCTION = 3


def late_columns() -> dict[str, list]:
    """Columns that have no value for long."""
    whole = {name: column.tolist() for name, column in columns().items()}
    half = ROWS // 2
    return whole | {
        "a": ["view" if n % 2 else "buy" for n in range(ROWS)],
        "f": [None] * half + [n / 2 for n in range(ROWS - half)],
        "v": [None] * half + [0.5] * (ROWS - half),
    }


def from_items():
    """Rows as Python's objects: a block of them has no type for what none of its rows has."""
    import ray.data

    whole = late_columns()
    rows = [{name: column[n] for name, column in whole.items()} for n in range(ROWS)]
    return ray.data.from_items(rows, override_num_blocks=6)


def failing():
    raise RuntimeError("no such day\nat all")


def leaving():
    raise SystemExit(3)


def failing_in_a_task():
    import ray.data

    def rows(batch):
        raise ValueError("no such column")

    return ray.data.range(9).map_batches(rows)


def twice():
    import ray.data

    names = ["u", "i", "t", "i"]
    return ray.data.from_arrow(pa.table([pa.array([n]) for n in range(4)], names=names))


def without_times():
    import ray.data

    return ray.data.from_arrow(pa.table({"u": [1], "i": [2]}))
