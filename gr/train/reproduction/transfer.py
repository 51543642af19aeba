"""The table of adapters: a run on one catalogue, taken to another by each method, inside either encoder or both.

Each direction has a source, trained first, and for each method and each of its parts a cell that starts from there,
with the same seed; full fine-tuning and a start anew stand beside them.  A table is configs/NAME/table.yaml with
``folder``, in which DIRECTION-METHOD.yaml are the configs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gr.config import Section, load, read_yaml, validate
from gr.errors import UserError, nearest
from gr.shipped import find_table
from gr.train import checkpoint
from gr.train.cells import Cell, Trained, train_cells
from gr.train.folder import RunFolder
from gr.train.reproduction.hypotheses import Hypothesis, tested, to_json
from gr.train.reproduction.prepared import check_evaluates, prepare, refuse_torchrun
from gr.train.reproduction.views import mean_and_spread
from gr.train.saved_weights import SavedWeights
from gr.train.selection import best_validation, selection_metric

FULL, SCRATCH = "full", "scratch"


class Direction(Section):
    """``source``, ``target``: datasets; ``start``: the config of the source's run."""

    name: str
    source: str
    target: str
    start: str


class TransferTable(Section):
    """``parts``: which of the two encoders adapts, by name, as changes to a method's config; the first is both."""

    name: str
    columns: list[str]
    folder: str
    directions: list[Direction]
    methods: list[str]
    parts: dict[str, list[str]]


@dataclass(frozen=True)
class Adapted:
    """A row: what it gives at the epoch that validation chose, a value a seed.  ``trained``: numbers that train."""

    direction: str
    method: str
    part: str
    trained: int
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.part}" if self.part else self.method


def read_transfer(name: str) -> TransferTable | None:
    """The table ``name``, if it is one of transfers."""
    raw = read_yaml(find_table(name))
    return validate(TransferTable, raw, "") if "directions" in raw else None


def transfer(
    table: TransferTable,
    source: str | None,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    processes: int = 1,
    out: str = "runs/reproduce",
    data: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Adapted]:
    """Train the sources, then the rows (all, or those of the methods, parts and directions that are named).

    data: the folder of the prepared datasets; source: of the raw ones, each in a folder of its own name.
    """
    refuse_torchrun()
    base = data or "data"
    wanted = _chosen(table, rows)
    starts: dict[str, Cell] = {}
    cells: dict[str, list[Cell]] = {}
    for direction, method, part in wanted:
        for seed in seeds:
            start = _start(table, direction, seed, out, base, overrides, processes)
            starts[start.folder] = start
            row = _row(table, direction, method, part, seed, out, base, start, overrides, processes)
            cells.setdefault(f"{direction.name} {method} {part}", []).append(row)
    all_cells = [*starts.values(), *(cell for row in cells.values() for cell in row)]
    for cell in all_cells:
        check_evaluates(
            table.name, cell.name, table.columns, ["test", "valid"], load(cell.config, cell.overrides)
        )
    for name in dict.fromkeys(n for d, _, _ in wanted for n in (d.source, d.target)):
        if not (Path(base) / name / "manifest.json").is_file():
            prepare(name, {}, None if source is None else str(Path(source) / name), f"{base}/{name}")
    trained = train_cells(all_cells)[len(starts) :]
    found, left = [], iter(trained)
    for (direction, method, part), of_row in zip(wanted, cells.values(), strict=True):
        of_seeds = [next(left) for _ in of_row]
        found.append(
            Adapted(direction.name, method, part, _trained(of_seeds[0]), [_chosen_epoch(t) for t in of_seeds])
        )
    return found


def hypotheses_of(found: Sequence[Adapted], table: TransferTable) -> list[Hypothesis]:
    """What is to be tested (Adapter4Rec, WSDM 2024): adapters are about as good as full fine-tuning, both encoders need
    them, Houlsby's is among the best; and that anything is taken along at all."""
    return [one for direction in table.directions for one in _hypotheses(found, table, direction.name)]


def _hypotheses(found: Sequence[Adapted], table: TransferTable, direction: str) -> Iterator[Hypothesis]:
    rows = {(row.method, row.part): row for row in found if row.direction == direction}
    both, *single = table.parts
    pairs = [((FULL, both), (SCRATCH, ""))]
    for method in table.methods:
        pairs += [((method, both), (FULL, both)), ((method, both), (SCRATCH, ""))]
        pairs += [((method, both), (method, part)) for part in single]
    pairs += [(("houlsby", both), (method, both)) for method in table.methods if method != "houlsby"]
    for pair in pairs:
        if all(row in rows for row in pair):
            high, low = ((rows[row].name, rows[row].results) for row in pair)
            yield tested(table.columns[0], high, low, where=direction)


def print_transfer(found: Sequence[Adapted], table: TransferTable) -> None:
    """A table a direction; means over seeds, with the spread where there are several."""
    console = Console()
    for direction in table.directions:
        view = Table(title=f"{direction.name}: at the epoch that validation chooses", title_justify="left")
        view.add_column("what trains")
        for column in ("numbers", *table.columns, "epochs"):
            view.add_column(column, justify="right")
        for row in (row for row in found if row.direction == direction.name):
            figures = [
                mean_and_spread([result[column] for result in row.results]) for column in table.columns
            ]
            epochs = "/".join(str(result["epoch"] + 1) for result in row.results)
            view.add_row(row.name, f"{row.trained:,}", *figures, epochs)
        if view.row_count:
            console.print(view)


def save_transfer(found: Sequence[Adapted], hypotheses: Sequence[Hypothesis], folder: str | Path) -> Path:
    """``table.json``: the rows with their seeds' results, and the hypotheses."""
    content = {"rows": [asdict(row) for row in found], "hypotheses": to_json(hypotheses)}
    file = Path(folder) / "table.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _chosen(table: TransferTable, rows: Sequence[str]) -> list[tuple[Direction, str, str]]:
    """The rows of the table, (direction, method, part); with ``rows`` those that have each kind of word among them."""
    kinds = [
        [d.name for d in table.directions],
        [SCRATCH, FULL, *table.methods],
        [p.split()[0] for p in table.parts],
    ]
    for word in rows:
        if not any(word in kind for kind in kinds):
            raise UserError(f"no row '{word}': {nearest(word, (word for kind in kinds for word in kind))}")
    directions, methods, parts = ([word for word in kind if word in rows] or kind for kind in kinds)
    found: list[tuple[Direction, str, str]] = []
    for direction in (d for d in table.directions if d.name in directions):
        for method in methods:
            of_method = [""] if method == SCRATCH else [p for p in table.parts if p.split()[0] in parts]
            found += [(direction, method, part) for part in of_method]
    return found


def _start(
    table: TransferTable,
    direction: Direction,
    seed: int,
    out: str,
    base: str,
    overrides: Sequence[str],
    processes: int,
) -> Cell:
    config = find_table(table.name).parent / table.folder / direction.start
    folder = f"{out}/{table.name}/{direction.source}-seed{seed}"
    given = (f"data.path={base}/{direction.source}", f"train.seed={seed}", *overrides)
    return Cell(f"{direction.source}, source", config, folder, given, processes)


def _row(
    table: TransferTable,
    direction: Direction,
    method: str,
    part: str,
    seed: int,
    out: str,
    base: str,
    start: Cell,
    overrides: Sequence[str],
    processes: int,
) -> Cell:
    name = f"{direction.name}-{method}"
    config = find_table(table.name).parent / table.folder / f"{name}.yaml"
    which = f"-{part.split()[0]}" if part else ""
    given = [
        f"data.path={base}/{direction.target}",
        f"train.seed={seed}",
        *overrides,
        *table.parts.get(part, ()),
    ]
    if method != SCRATCH:
        given.append(f"train.start_from.run={json.dumps(start.folder)}")
    cell = f"{out}/{table.name}/{name}{which}-seed{seed}"
    return Cell(f"{name} {part}".strip(), config, cell, tuple(given), processes)


def _chosen_epoch(trained: Trained) -> dict[str, Any]:
    """The test row of the step that validation chose."""
    best = best_validation(trained.metrics, selection_metric(trained.config))
    assert best is not None, "rows of the table hold a validation action out"
    tests = (r for r in trained.metrics if r["kind"] == "eval" and r["split"] == "test")
    return next(row for row in tests if row["step"] == best["step"])


def _trained(trained: Trained) -> int:
    """Numbers that train: what is in a checkpoint."""
    newest = checkpoint.newest(RunFolder(trained.cell.folder).checkpoints)
    assert newest is not None, "a finished run has a checkpoint"
    return sum(math.prod(size) for size in SavedWeights(newest).sizes.values())
