"""Plans on paper: what they say of small runs is what these take, and of a cluster what can be told by hand."""

from __future__ import annotations

import json
import re
from itertools import accumulate

import pytest
import torch

from benchmarks.training.planned_memory import measured_peak
from gr import config as configs
from gr.errors import UserError
from gr.processes import Processes
from gr.programs import plan as program
from gr.scaling.imagined import drawn_lengths, heaviest_share
from gr.scaling.machine import cpu, gpu
from gr.scaling.memory import memory
from gr.scaling.plan import Imagined, Planner
from gr.scaling.rehearsal import Paper
from gr.train import job
from gr.train.dry_run import dry_run
from gr.train.folder import RunFolder, read_rows
from gr.train.parts import build
from gr.train.planning import OfDataset

pytest.importorskip("torchrec")

KINDS = {
    "adamw": [],
    "recompute, lazy": [
        "train.activation_checkpointing=true",
        "optimizer.name=lazy_adam",
        "model.encoder.layers=4",
    ],
    "micro-batches": ["train.micro_batch_actions=96", "objective=full_softmax"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_step_is_what_it_takes(config, kind):
    run = config("model.dim=64", "train.global_batch=64", "model.encoder.qk_dim=32", *KINDS[kind])
    processes = Processes(torch.device("cpu"))
    parts = build(run, processes)
    planned = Planner(run, OfDataset(parts.data), cpu(1)).plan(run, 1, {})
    assert measured_peak(run, parts, processes) == pytest.approx(planned.memory.peak, rel=0.1)


def agreeing(run, tmp_path, capsys) -> dict:
    """The program's plan of a run, whose memory is that which a dry run of it tells."""
    dry_run(run)
    written = capsys.readouterr()
    assert "rehearsing: 3 steps in" in written.err
    said = re.search(r"memory as planned\W+([\d.]+) MiB", written.out)
    file, plans = tmp_path / "same.yaml", tmp_path / "plans.json"
    file.write_text(configs.to_yaml(run))
    asked = ["--config", str(file), "--gpu", "cpu", "--gpus-per-node", "1", "--json", str(plans)]
    assert program.main(asked) == 0
    (plan,) = json.loads(plans.read_text())
    assert float(said[1]) == pytest.approx(plan["memory"]["peak"] / 2**20, rel=0.1)
    return plan


def test_a_rehearsal_and_a_plan_agree(config, tmp_path, capsys):
    agreeing(config("model.dim=32"), tmp_path, capsys)


def test_the_log_tells_the_work_of_each_step_and_of_all(config):
    run = job.run(config("train.max_steps=3", "eval.splits=[]"))
    rows = [row for row in run.metrics if row["kind"] == "train"]
    assert [row["pflop_days"] * 8.64e19 for row in rows] == pytest.approx(
        list(accumulate(row["flops"] for row in rows))
    )
    assert all(row["tokens"] == row["targets"] > 0 and isinstance(row["flops"], int) for row in rows)
    timing = read_rows(RunFolder(run.path).timing)[-1]
    assert 0 < timing["mfu"] < timing["mfu_padded"] and timing["tflops"] > 0


def expected(**more):
    data = {"path": "nowhere", "max_length": 64}
    data["expected"] = {"items": 10_000_000, "users": 1000, "lengths": [8, 32, 64]}
    return configs.from_dict(
        {
            "data": data,
            "model": {
                "dim": 64,
                "table": {"name": "torchrec", "sharding": "row_wise"},
                "encoder": {"name": "hstu", "layers": 3, "heads": 2, "qk_dim": 32, "v_dim": 32},
            },
            "objective": {"name": "sampled_softmax", "negatives": 16},
            "optimizer": {"name": "rowwise_adagrad"},
            "train": {"global_batch": 256, "precision": "bf16", **more},
        }
    )


def test_a_plan_for_a_cluster_adds_up_as_by_hand():
    run = expected()
    plan = Planner(run, Imagined(run), gpu("h100", 80)).grid([2], {})[0]
    (table,) = plan.tables
    assert plan.fits and len({part.rank for part in table.held}) == 16
    rows, dense = 10_000_000 / 16, plan.parameters - 64 * 10_000_000
    kept = plan.memory.kept
    assert (kept["table rows"], kept["table moments"]) == (4 * rows * 64, 4 * rows)
    assert kept["dense parameters"] == kept["dense gradients"] == kept["dense moments"] / 2 == 4 * dense
    sent = {exchange.name: exchange.sent for exchange in plan.exchanges}
    assert sent["dense gradients"] == 2 * 4 * dense * 15 / 16
    assert sent["rows of items"] == 4 * 64 * plan.rehearsal.rows["items"] * 15 / 16
    lengths = drawn_lengths([8, 32, 64], 256, 64)
    assert plan.tokens == lengths.sum() and abs(lengths.mean() - 34) < 0.5
    assert plan.time.seconds > 0 and 0 < plan.mfu < 1
    hours = plan.budget(1e9, 2.0)
    assert hours["cost"] == pytest.approx(hours["days"] * 24 * 16 * 2.0)


def test_what_is_shared_out_is_kept_once_and_what_does_not_fit_is_said_with_what_would():
    run = expected()
    planner = Planner(run, Imagined(run), gpu("h100", 80))
    kept = {}
    for stage in range(4):
        kept[stage] = planner.grid([1], {"zero": [stage]})[0].memory.kept
    assert kept[1]["dense moments"] == kept[0]["dense moments"] / 8
    assert kept[2]["dense gradients"] == kept[0]["dense gradients"] / 8
    assert kept[3]["dense parameters"] == kept[0]["dense parameters"] / 8
    large = configs.override(expected(global_batch=2048), ["data.expected.items=10000"])
    room = 0.9 * Planner(large, Imagined(large), gpu("h100")).grid([1], {})[0].memory.peak / 2**30
    tight = Planner(large, Imagined(large), gpu("h100", room)).grid([1], {})[0]
    assert not tight.fits and "most are activations and gradients" in tight.problem
    assert any(remedy.startswith("train.activation_checkpointing=true") for remedy in tight.remedies)
    without = Planner(run, Imagined(run), gpu("h100", 0.25)).grid([1], {})[0]
    assert "no plan puts table 'items'" in without.problem and without.remedies[0].startswith("2 nodes")


def test_processes_that_share_sequences_share_their_work_and_memory_and_exchange_pieces():
    run = configs.override(expected(), ["data.expected.lengths=[512,1024]", "data.max_length=1024"])
    run = configs.override(run, ["model.table=local", "data.expected.items=1000", "train.global_batch=4"])
    found = {}
    for size in (1, 2, 4):
        shared = configs.override(run, [f"train.context={size}"])
        found[size] = Planner(shared, Imagined(shared), gpu("h100")).plan(shared, size, {})
    assert len({plan.flops for plan in found.values()}) == 1  # the model's own, whoever does it
    lengths = drawn_lengths([512, 1024], 4, 1024)
    layers, wide = 3, 2 * (32 + 32)
    for size, plan in found.items():
        work = sum(o.flops for o in plan.rehearsal.operations if o.attends)
        assert work == pytest.approx(3.5 * layers * wide * float((lengths**2).sum()) / size, rel=0.01)
    working = [plan.rehearsal.working for plan in found.values()]
    assert working[2] < 0.45 * working[0] and working[1] < 0.75 * working[0]  # pieces don't get fewer
    sent = {size: {e.name: e.sent for e in plan.exchanges} for size, plan in found.items()}
    # of two, one sees half of the other's keys and values, who sees all: they go there twice, bfloat16, and their
    # gradients come home, float32
    rows = int(lengths.sum())
    assert sent[2]["pieces of shared sequences"] == layers * wide * (2 * 2 * rows / 2 + 4 * rows / 4)
    assert not sent[1]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["train.context=3"], "8 processes can't be cut into groups of 3 that share a sequence"),
        (["train.context=2", "train.engine=fsdp"], "train.engine fsdp has only been tried with whole"),
        (["train.context=2", "model.encoder={name: gru4rec}"], "reads a sequence row after row"),
        (["train.context=2", "train.global_batch=3"], "fewer sequences than 4 groups of processes"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused_as_in_training(asked, says):
    run = configs.override(expected(), asked)
    with pytest.raises(UserError, match=says):
        Planner(run, Imagined(run), gpu("h100")).plan(run, 8, {})


def test_a_step_on_more_rows_takes_more():
    run = expected()
    paper = Paper(run, Imagined(run).catalogue, gpu("h100").cluster(8))
    source = Imagined(run)
    found = [paper.rehearse(source.batches(run, paper.model.needs, n)[1]) for n in (16, 8)]
    assert found[0].working < found[1].working and found[0].rows["items"] < found[1].rows["items"]
    assert memory(paper, found[0]).peak < memory(paper, found[1]).peak
    assert heaviest_share(drawn_lengths([4], 7, 9), 3).tolist() == [4, 4, 4]
    assert heaviest_share(drawn_lengths([1, 9], 4, 9), 2).tolist() == [8, 2]


def test_the_program_prints_tables_and_writes_files(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(expected()))
    asked = ["--config", str(file), "--nodes", "1,2", "--zero", "0,1", "--tokens", "1e9", "--price", "2"]
    asked += ["--json", str(tmp_path / "plans.json"), "--plot", str(tmp_path / "plans")]
    assert program.main(asked) == 0
    plans = json.loads((tmp_path / "plans.json").read_text())
    speeds = [plan["tokens_per_second"] / plan["processes"] for plan in plans]
    assert len(plans) == 4 and speeds == sorted(speeds, reverse=True)
    assert (tmp_path / "plans.png").stat().st_size > 10_000 and (tmp_path / "plans.svg").exists()
    out = capsys.readouterr().out
    assert "4 plans, best first" in out and "by TorchRec's planner" in out and "all to all" in out


def test_pairs_that_cannot_be_are_left_out_and_said(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(expected(global_batch=16)))
    assert program.main(["--config", str(file), "--nodes", "1,4,1", "--batch", "16,64"]) == 0
    said = capsys.readouterr()
    assert "3 plans, best first" in said.out
    assert said.err.startswith(
        "left out, nodes 4, batch 16: train.global_batch is 16, fewer sequences than 32"
    )
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--nodes", "x"], "--nodes x: give whole numbers"),
        (["--gpu", "v100"], "nothing is known of a GPU 'v100'"),
        (["--machine", "sped=1"], "a machine has no 'sped': did you mean 'speed'?"),
        (["--machine", "attention=2"], "attention is a share of a ceiling, 1 at most"),
        (["--machine", "moved=nan"], "moved must be above 0"),
        (["--machine", "per_machine=0.5"], "a machine has a whole number of devices"),
        (["--zero", "4"], "stages are 0 to 3"),
        (["--nodes", "64"], "fewer sequences than 512 processes"),
        (["data.expected=null"], "there is no dataset at 'nowhere'"),
        (["model.table=mapped"], "use model.table=torchrec"),
        (["--nodes", "0"], "--nodes and --gpus-per-node are 1 or more"),
        (["--price", "-1"], "--price -1.0: give a number above 0"),
        (["--sharding", ""], "--sharding '': known: auto, column_wise"),
        (["--sharding", "row_wize"], "did you mean 'row_wise'?"),
        (
            ["--sharding", "row_wise,auto", "model.table=local"],
            "no table of the config is cut among processes",
        ),
        (["--json", "."], "'.' is a folder"),
        (["--plot", "/dev/null/plans"], "'/dev/null' is not a folder to write in"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, asked, says):
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(expected()))
    assert program.main(["--config", str(file), *asked]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
