"""Whole runs on groups of processes: made by hand or by a launcher, by every engine, with rows kept by their owners."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from gr import config as configs
from gr.train import job
from gr.train.checkpoint import listed, read_state
from gr.train.folder import RunFolder
from tests.distributed.group import in_group
from tests.distributed.jobs import run_jobs
from tests.distributed.test_training import LOSS_TOLERANCE, NO_DROPOUT, WEIGHT_TOLERANCE
from tests.end_to_end.tiny import ROOT, make_dataset, weights, write_config
from tests.programs import in_ranks

USERS, VALIDATED = 150, 143
"""Of the tiny dataset: all have a test action, those with three actions a validation action too."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("groups")
    make_dataset(path / "data")
    return path


def train(folder: Path, runs: dict[str, list[str]]) -> dict[str, list[dict]]:
    """Train every run of ``runs`` (name -> overrides) one after another; their metrics on the main process."""
    metrics = {}
    for name, overrides in runs.items():
        file = folder / f"{name}.yaml"
        metrics[name] = job.run(configs.load(file, overrides)).metrics
    return metrics


def in_processes(
    folder: Path, ranks: int, runs: dict[str, list[str]], by_hand: bool = True
) -> dict[str, list[dict]]:
    """:func:`train` on ``ranks`` processes."""
    for name in runs:
        write_config(folder, folder / "data", folder / name)
    if ranks == 1:
        return train(folder, runs)
    first, *others = in_group(train, ranks, folder / f"{'-'.join(runs)} group", folder, runs, by_hand=by_hand)
    assert all(metrics == {name: [] for name in runs} for metrics in others), (
        "one process alone has the metrics"
    )
    return first


def losses(metrics: list[dict]) -> list[float]:
    return [row["loss"] for row in metrics if row["kind"] == "train"]


def test_a_group_made_by_hand_trains_as_the_launchers_does(folder):
    """Dropout is each process's own: losses tell how many there were."""
    short = ["train.max_steps=6"]
    by_hand = in_processes(folder, 2, {"by_hand": short})["by_hand"]
    launched = in_processes(folder, 2, {"launched": short}, by_hand=False)["launched"]
    alone = in_processes(folder, 1, {"alone": short})["alone"]
    assert by_hand == launched
    assert [row["data_digest"] for row in by_hand if row["kind"] == "train"] == [
        row["data_digest"] for row in alone if row["kind"] == "train"
    ]
    assert losses(by_hand) != losses(alone), "two processes trained as one"
    for metrics in (by_hand, alone):
        users = {row["split"]: row["users"] for row in metrics if row["kind"] == "eval"}
        assert users == {"valid": VALIDATED, "test": USERS}
    assert len(losses(by_hand)) == len(RunFolder(folder / "by_hand").read_metrics()) - 2 == 6


KINDS = {
    "ddp": [],
    "all_reduce": ["train.engine=all_reduce"],
    "mapped": ["model.table=mapped"],
    "mapped_all_reduce": ["model.table=mapped", "train.engine=all_reduce"],
}
BIASED = [
    "model.similarity={normalize: false, temperature: 1.0, item_bias: true}",
    "optimizer.weight_decay=0.05",
]


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list[dict]]:
    """The same run of every kind on two processes, mapped on four, and as a local table on one: metrics by name."""
    common = [*NO_DROPOUT, *BIASED]
    found = in_processes(folder, 1, {"local_one": common, "mapped_one": [*common, *KINDS["mapped"]]})
    found |= in_processes(folder, 2, {name: [*common, *kind] for name, kind in KINDS.items()})
    return found | in_processes(folder, 4, {"mapped_four": [*common, *KINDS["mapped"]]})


@pytest.mark.parametrize(("one", "other"), [("ddp", "all_reduce"), ("mapped", "mapped_all_reduce")])
def test_both_engines_give_the_same_bits_on_two_processes(folder, runs, one, other):
    assert runs[one] == runs[other]
    mine, theirs = weights(folder / one), weights(folder / other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("name", ["mapped_one", "mapped", "mapped_four", "ddp"])
def test_a_mapped_table_trains_alike_on_one_two_and_four_processes(folder, runs, name):
    """The tolerances are those of local tables on several processes (test_training.py says where they come from)."""
    assert [row["targets"] for row in runs[name] if row["kind"] == "train"] == [
        row["targets"] for row in runs["local_one"] if row["kind"] == "train"
    ]
    assert losses(runs[name]) == pytest.approx(losses(runs["local_one"]), rel=LOSS_TOLERANCE)
    expected, found = weights(folder / "local_one"), weights(folder / name)
    assert found.keys() == expected.keys(), "a checkpoint says nothing of tables and engines"
    for key, tensor in expected.items():
        if key.startswith("model/"):
            assert (found[key] - tensor).abs().max() <= WEIGHT_TOLERANCE, key
        elif key.startswith("optimizer/step/"):
            assert found[key] == tensor == 12
        else:  # moments are means of gradients, and of their squares, which are off by twice as much
            assert (found[key] - tensor).abs().max() <= 2 * LOSS_TOLERANCE * tensor.abs().max(), key


def test_a_mapped_run_of_four_processes_goes_on_as_a_local_one_of_two(folder, runs):
    """Checkpoints hold whole tensors: other processes, another engine, the other table."""
    in_processes(folder, 4, {"changes": [*NO_DROPOUT, *BIASED, "model.table=mapped", "train.max_steps=5"]})
    (found, _) = in_group(go_on, 2, folder / "changes goes on", folder / "changes")
    assert found == pytest.approx(losses(runs["local_one"]), rel=LOSS_TOLERANCE)


def go_on(run: Path) -> list[float]:
    result = job.resume(run, ["train.max_steps=12", "model.table=local", "train.engine=all_reduce"])
    return losses(result.metrics)


def test_what_one_process_is_told_or_finds_all_do(folder):
    """A signal to one stops all after the same step; all know which validation was the best, save there, and stop
    early together; all go on with what the first one finds where a run is judged otherwise than before."""
    names = ("told", "early", "judged")
    told, early, judged = ({"config": write_config(folder, folder / "data", folder / name)} for name in names)
    told |= {"overrides": ["eval.splits=[]", "checkpoint.every_steps=null"], "told": [1, 3]}
    early["overrides"] = [
        *(
            "train.epochs=30",
            "optimizer.lr=0.3",
            "train.early_stopping={metric: mrr, patience: 2}",
            "eval.splits=[valid]",
        ),
        *("eval.every_steps=3", "checkpoint={every_steps: null, every_epochs: 99, keep: 1}"),
    ]
    judged["overrides"] = ["train.epochs=1", "eval.splits=[valid]", "checkpoint={every_steps: null, keep: 1}"]
    again = {"resume": folder / "judged", "overrides": ["eval.exclude=none", "train.timeout=30"]}
    assert run_jobs(folder, [told, early, judged, again], 2) == [[None, None]] * 4
    saved = {name: [step for step, _ in listed(RunFolder(folder / name).checkpoints)] for name in names}
    assert saved["told"] == [4]
    valid = [r for r in RunFolder(folder / "early").read_metrics() if r.get("split") == "valid"]
    best = max(valid, key=lambda row: row["mrr"])["step"]
    assert saved["early"] == [best, valid[-1]["step"]] and valid[-3]["step"] == best < 200
    newest = listed(RunFolder(folder / "judged").checkpoints)[-1][1]
    assert read_state(newest)["cursor"]["best"] == {}, "no validation so far can be compared"


def test_a_folder_that_processes_do_not_share_is_refused(folder, tmp_path):
    """Each process has a disk of its own: a relative run.dir in different working directories, one of which holds a
    folder of that name."""
    config = write_config(folder, folder / "data", Path("run"))
    disks = [tmp_path / f"disk-{rank}" for rank in range(2)]
    for folder in (disks[0], disks[1] / "run"):
        folder.mkdir(parents=True)
    done = in_ranks([ROOT / "launch/train.py", "--config", config, "train.max_steps=2"], disks, timeout=120)
    assert [one.returncode for one in done] == [2, 2]
    said = [(one.stdout, one.stderr) for one in done]
    here = socket.gethostname()
    assert said == [
        (
            "",
            f"error: run.dir 'run' is not the same folder on rank 1 ({here}) as on rank 0 ({here}): put it on a file "
            "system that all machines share\n",
        ),
        ("", ""),
    ]
    left = [
        [str(file.relative_to(tmp_path)) for file in (tmp_path / f"disk-{rank}").rglob("*")]
        for rank in (0, 1)
    ]
    assert left == [[], ["disk-1/run"]], "nothing is left behind"
