"""Rebuilding a published table: prepare the data, train every row, each as a cell (gr/train/cells.py).

A table is configs/DATASET/table.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gr.config import load
from gr.data.dataset import SequenceDataset
from gr.errors import UserError, nearest
from gr.shipped import find_table
from gr.train.cells import Cell, train_cells
from gr.train.reproduction.paired import paired, print_paired, to_json
from gr.train.reproduction.prepared import check_evaluates, prepare, refuse_torchrun
from gr.train.reproduction.table import Measured, PublishedTable, Row, read_table


def reproduce(
    dataset: str,
    source: str | None,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    processes: int = 1,
    out: str = "runs/reproduce",
    data: str | None = None,
    selection: bool = True,
    overrides: Sequence[str] = (),
) -> list[Measured]:
    """Prepare ``dataset`` and train the rows (all of them, or those whose config is named) for every seed."""
    refuse_torchrun()
    table = read_table(dataset)
    chosen = [r for r in table.rows if not rows or Path(r.config).stem in rows]
    for name in rows:
        if name not in [Path(r.config).stem for r in table.rows]:
            raise UserError(f"no row '{name}': {nearest(name, (Path(r.config).stem for r in table.rows))}")
    for row in chosen:
        splits = ["test", "valid"] if row.valid else ["test"]
        check_evaluates(table.title, row.name, table.columns, splits, load(_config(table, row), overrides))
    base = data or f"data/{table.dataset}"
    paths = {protocol: f"{base}-{protocol}" for protocol in table.protocols} or {"": base}
    for protocol, path in paths.items():
        options = table.options | table.protocols.get(protocol, {})
        if (Path(path) / "manifest.json").is_file():
            _check_options(dataset, options, path)
            if source is not None:
                print(f"'{path}' is there: '{source}' is not prepared again", flush=True)
        else:
            prepare(table.prepares or table.dataset, options, source, path)

    trained_rows = [table.under(protocol, row) for protocol in paths for row in chosen]
    runs = [
        (row, cell, last)
        for row in trained_rows
        for seed in seeds
        for cell, last in _cells(table, row, seed, out, paths[row.protocol], selection, overrides, processes)
    ]
    measured = {row.name: Measured(row) for row in trained_rows}
    for (row, _, last), trained in zip(runs, train_cells([cell for _, cell, _ in runs]), strict=True):
        measured[row.name].add(trained, last)
    if table.oracle:
        for seed in seeds:
            _pair({row.name: _folder(table, row, seed, out) for row in chosen}, f"{out}/{dataset}", seed)
    return list(measured.values())


def _cells(
    table: PublishedTable,
    row: Row,
    seed: int,
    out: str,
    path: str,
    selection: bool,
    overrides: Sequence[str],
    processes: int,
) -> Iterator[tuple[Cell, bool]]:
    """A row's trainings for a seed, and whether each one's last epoch counts: the row as published, and where its
    protocol holds no validation action out, one more that does, to choose the epoch."""
    base = [f"data.path={path}", f"train.seed={seed}", *overrides]
    if table.oracle:
        base.append("eval.baselines=[popularity, last_item, oracle]")
    config, folder = _config(table, row), _folder(table, row, seed, out)
    yield Cell(row.name, config, folder, tuple(base), processes), True
    if selection and not row.valid and not table.oracle:
        extra = (*base, "data.split.holdout=2", "eval.splits=[valid, test]")
        yield Cell(row.name, config, f"{folder}-holdout2", extra, processes), False


def _config(table: PublishedTable, row: Row) -> Path:
    return find_table(table.title).parent / row.config


def _folder(table: PublishedTable, row: Row, seed: int, out: str) -> str:
    protocol = f"{row.protocol}-" if row.protocol else ""
    return f"{out}/{table.title}/{protocol}{Path(row.config).stem}-seed{seed}"


def _pair(runs: dict[str, str], folder: str, seed: int) -> None:
    """Print the runs' HR@10 with standard errors, as paired differences and against the oracle; keep it as JSON."""
    rows = paired(runs)
    print_paired(rows, f"HR@10 on the same {rows[0].users:,} test records, ± a standard error; seed {seed}")
    (Path(folder) / f"paired-seed{seed}.json").write_text(json.dumps(to_json(rows), indent=1) + "\n")


def _check_options(dataset: str, options: Mapping[str, Any], path: str) -> None:
    """Refuse a dataset that is there but was made with other options than the table's."""
    made = SequenceDataset(path).manifest.provenance.get("options", {})
    for key, value in options.items():
        if made.get(key) != value:
            raise UserError(
                f"'{path}' was made with {key}={made.get(key)}, and the table of '{dataset}' needs {value}: "
                "choose another --data, or move that folder away"
            )
