"""Rebuilding a published table: prepare the data, train every row.

A table is configs/DATASET/table.yaml.  Each row trains in a process of its own; a finished run is not repeated, an
interrupted one goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gr.config import RunConfig, load
from gr.data.dataset import SequenceDataset
from gr.errors import UserError, nearest
from gr.train import checkpoint
from gr.train.folder import RunFolder
from gr.train.job import differences, within
from gr.train.reproduction.paired import paired, print_paired, to_json
from gr.train.reproduction.table import ROOT, Measured, PublishedTable, Row, read_table

NOT_THE_RESULT = (
    *("run", "checkpoint", "log", "data.path", "data.prefetch", "data.ingest"),
    *("eval.batch", "eval.max_scores", "eval.buckets"),
    *("train.device", "train.threads", "train.kernels", "train.micro_batch_actions"),
)
"""Keys in which a run that is there may differ from the one asked for."""


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
    table = read_table(dataset)
    chosen = [r for r in table.rows if not rows or Path(r.config).stem in rows]
    for name in rows:
        if name not in [Path(r.config).stem for r in table.rows]:
            raise UserError(f"no row '{name}': {nearest(name, (Path(r.config).stem for r in table.rows))}")
    for row in chosen:
        _check_evaluates(table, row, load(ROOT / "configs" / dataset / row.config, overrides))
    path = data or f"data/{dataset}"
    if (Path(path) / "manifest.json").is_file():
        _check_options(table, path)
        if source is not None:
            print(f"'{path}' is there: '{source}' is not prepared again", flush=True)
    else:
        _prepare(table, source, path)
    measured = []
    for row in chosen:
        result = Measured(row)
        for seed in seeds:
            stem = _folder(out, dataset, row, seed)
            base = [f"data.path={path}", f"train.seed={seed}", *overrides]
            if table.oracle:
                base.append("eval.baselines=[popularity, last_item, oracle]")
            result.add(_train(dataset, row, stem, base, processes))
            if selection and not row.valid and not table.oracle:
                extra = [*base, "data.split.holdout=2", "eval.splits=[valid, test]"]
                result.add(_train(dataset, row, f"{stem}-holdout2", extra, processes), chosen_only=True)
        measured.append(result)
    if table.oracle:
        for seed in seeds:
            _pair({row.name: _folder(out, dataset, row, seed) for row in chosen}, f"{out}/{dataset}", seed)
    return measured


def _folder(out: str, dataset: str, row: Row, seed: int) -> str:
    return f"{out}/{dataset}/{Path(row.config).stem}-seed{seed}"


def _pair(runs: dict[str, str], folder: str, seed: int) -> None:
    """Print the runs' HR@10 with standard errors, as paired differences and against the oracle; keep it as JSON."""
    rows = paired(runs)
    print_paired(rows, f"HR@10 on the same {rows[0].users:,} test records, ± a standard error; seed {seed}")
    (Path(folder) / f"paired-seed{seed}.json").write_text(json.dumps(to_json(rows), indent=1) + "\n")


def _check_evaluates(table: PublishedTable, row: Row, config: RunConfig) -> None:
    """Refuse overrides that leave a column of the table without its figure, before anything is trained."""
    measured = {f"{kind}@{k}" for kind in ("hr", "ndcg") for k in config.eval.ks} | {"mrr"}
    if missing := [column for column in table.columns if column not in measured]:
        raise UserError(
            f"the table of '{table.dataset}' shows {missing[0]}: add its k to eval.ks={config.eval.ks}"
        )
    for split in ["test", "valid"] if row.valid else ["test"]:
        if split not in config.eval.splits:
            raise UserError(f"'{row.name}' needs split '{split}': add it to eval.splits={config.eval.splits}")


def _check_options(table: PublishedTable, path: str) -> None:
    """Refuse a generated dataset that is there but was made with other options than the table's."""
    made = SequenceDataset(path).manifest.provenance.get("options", {})
    for key, value in table.options.items():
        if made.get(key) != value:
            raise UserError(
                f"'{path}' was made with {key}={made.get(key)}, and the table of '{table.dataset}' needs {value}: "
                "choose another --data, or move that folder away"
            )


def _prepare(table: PublishedTable, source: str | None, path: str) -> None:
    command = [sys.executable, str(ROOT / "launch/prepare.py"), table.dataset, "--out", path]
    if source is not None:
        command += ["--source", source]
    for key, value in table.options.items():
        command += ["--set", f"{key}={value}"]
    if subprocess.run(command).returncode:
        raise UserError(f"preparing '{table.dataset}' failed (see above): give its raw files with --source")


def _train(
    dataset: str, row: Row, folder: str, overrides: Sequence[str], processes: int
) -> list[dict[str, Any]]:
    """Metrics of the finished run in ``folder``: trained now, gone on with, or there already."""
    run = RunFolder(folder)
    config = ROOT / "configs" / dataset / row.config
    arguments = ["--config", str(config), f"run.dir={folder}", *overrides]
    if run.config.is_file():
        arguments = ["--resume", folder]
        for key, found, wanted in differences(load(run.config), load(config, overrides)):
            if not within(key, NOT_THE_RESULT):
                raise UserError(
                    f"'{folder}' is there and was trained with {key}={found}, not {wanted}: choose another --out, "
                    "or move that run away"
                )
    newest = checkpoint.newest(run.checkpoints)
    if newest is None or not checkpoint.read_state(newest)["cursor"]["finished"]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        print(f"\n{row.name}: {folder}", flush=True)
        if subprocess.run([*launcher, str(ROOT / "launch/train.py"), *arguments]).returncode:
            raise UserError(f"training '{row.name}' failed (see above); run the same command again to go on")
        newest = checkpoint.newest(run.checkpoints)
        if newest is None or not checkpoint.read_state(newest)["cursor"]["finished"]:
            raise UserError(f"training '{row.name}' was stopped; run the same command again to go on")
    return run.read_metrics()
