"""Every engine trains as plain DDP does on one process, over any number of processes and whatever the tables."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from gr import config as configs
from gr.processes import Axis, Processes
from gr.train.folder import RunFolder
from gr.train.parts import build_batches, open_data
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import adamw, of_losses, of_weights, sgd
from tests.end_to_end.tiny import ROOT, command, make_dataset, weights, write_config
from tests.packages import needs
from tests.precision import UNIT
from tests.programs import in_ranks, run_python
from tests.unit.test_ranking_run import CONFIG as RANKING, make_dataset as make_ranking_dataset

needs("torchrec", "fbgemm_gpu", "deepspeed")

ENGINES = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "zero1": "{name: deepspeed, zero: 1}",
    "zero2": "{name: deepspeed, zero: 2}",
    "zero3": "{name: deepspeed, zero: 3}",
    # no parameter is small enough to stay whole between two uses
    "zero3 in parts": "{name: deepspeed, zero: 3, whole_below: 0}",
}
OTHERS = [name for name in ENGINES if name != "ddp"]
TABLES = {
    "local": "model.table=local",
    "mapped": "model.table=mapped",
    "torchrec": "model.table={name: torchrec, sharding: row_wise}",
}
# SGD's steps are as large as the gradients, so that a wrong scale shows; clipped, that of one part beside another does
OPTIMIZERS = {
    "sgd": ["optimizer={name: sgd, lr: 0.5}", "train.clip_norm=null"],
    "clipped": ["optimizer={name: sgd, lr: 0.5, momentum: 0.9}", "train.clip_norm=0.2"],
    "adamw": ["optimizer={name: adamw, lr: 0.01, weight_decay: 0.1, groups: [{match: bias, lr: 0.003}]}"],
}
STEPS = 6
MICRO = "train.micro_batch_actions=35"
PLAIN = [
    *("model.input.dropout=0", "model.encoder.dropout=0", "eval.splits=[test]", f"train.max_steps={STEPS}"),
    *("checkpoint.every_steps=null", "data.window_blocks=1", MICRO),
]
LOSS, WEIGHT = of_losses(STEPS), of_weights(STEPS, max(sgd(0.5), adamw(0.01)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines")
    make_dataset(path / "data")
    return path


def asked(folder, name, *overrides):
    """A job's entry."""
    path = folder / name.replace(" ", "-")
    return {"config": write_config(folder, folder / "data", path), "overrides": [*PLAIN, *overrides]}


def rows(folder, name, kind="train"):
    return [r for r in RunFolder(folder / name.replace(" ", "-")).read_metrics() if r["kind"] == kind]


def assert_alike(folder, name, reference, loss=LOSS, weight=WEIGHT, metric="mrr"):
    """Same batches, same losses, norms, weights and moments within rounding, same metrics."""
    found, expected = rows(folder, name), rows(folder, reference)
    assert len(found) == len(expected) > 0
    for key in ("step", "targets", "samples", "data_digest", "lr"):
        assert [r[key] for r in found] == [r[key] for r in expected], (name, key)
    for key in ("loss", "grad_norm") if "grad_norm" in expected[0] else ("loss",):
        values = [[r[key] for r in of] for of in (found, expected)]
        np.testing.assert_allclose(*values, rtol=loss, err_msg=f"{name}: {key}")
    tensors, others = (weights(folder / n.replace(" ", "-")) for n in (name, reference))
    assert tensors.keys() == others.keys(), name
    for key, value in others.items():
        if "softmax" in name and key.endswith("key_value.bias") and value.dim():
            # the same number for all keys moves no softmax: AdamW follows what is left of a gradient of zero
            tensors[key], value = tensors[key][value.numel() // 2 :], value[value.numel() // 2 :]
        np.testing.assert_allclose(tensors[key], value, atol=weight, rtol=0, err_msg=f"{name}: {key}")
    for mine, theirs in zip(rows(folder, name, "eval"), rows(folder, reference, "eval"), strict=True):
        assert mine["users"] == theirs["users"]
        # one user's target may change places with a rival of the same score but for rounding
        assert mine[metric] == pytest.approx(theirs[metric], abs=2 / mine["users"])


@pytest.fixture(scope="module")
def references(folder):
    """One process, local tables, DDP: a run an optimiser, and those of the special cases."""
    jobs = [asked(folder, f"one {name}", *overrides) for name, overrides in OPTIMIZERS.items()]
    jobs += [
        asked(folder, "one odd", *OPTIMIZERS["clipped"], ODD),
        asked(folder, "one few", *OPTIMIZERS["sgd"], "train.global_batch=3"),
        asked(folder, "one softmax", *OPTIMIZERS["adamw"], *SOFTMAX),
    ]
    assert run_jobs(folder, jobs, 1) == [[None]] * len(jobs)
    return folder


ODD = "model.encoder.layers=1"  # with 129 numbers for times it makes an odd number of parameters
SOFTMAX = ["model.encoder={name: sasrec, attention_dropout: 0}", "objective={name: full_softmax}"]


def micro_batches(folder, ranks):
    """How many each rank has in each step of the first epoch."""
    config = configs.load(write_config(folder, folder / "data", folder / "counted"), PLAIN)
    data, counts = open_data(config), []
    for rank in range(ranks):
        processes = Processes(torch.device("cpu"), data=Axis(rank, ranks))
        batches = build_batches(config, data, frozenset({"item", "time"}), processes)
        counts.append([len(b.share.split(config.train.micro_batch_actions)) for b in batches.epoch(0, 0)])
    return list(zip(*counts, strict=True))


def test_the_ranks_of_the_cases_have_unequal_numbers_of_micro_batches(folder):
    for ranks in (2, 4):
        counted = micro_batches(folder, ranks)[:6]
        assert any(len(set(step)) > 1 for step in counted) and max(map(max, counted)) > 1


def test_two_processes_train_as_one(references):
    folder, jobs, expected = references, [], {}

    def case(reference, engine, *overrides):
        name = f"two {reference} {engine} {len(jobs)}"
        jobs.append(asked(folder, name, f"train.engine={ENGINES[engine]}", *overrides))
        expected[name] = reference

    for number, engine in enumerate(ENGINES):
        for turn, (optimizer, overrides) in enumerate(OPTIMIZERS.items()):
            table = list(TABLES)[(number + turn) % len(TABLES)]
            case(f"one {optimizer}", engine, *overrides, TABLES[table])
    for engine in ("ddp", "fsdp", "zero3 in parts"):
        case("one softmax", engine, *OPTIMIZERS["adamw"], *SOFTMAX, TABLES["torchrec"])
    assert run_jobs(folder, jobs, 2) == [[None, None]] * len(jobs)
    for name, reference in expected.items():
        assert_alike(folder, name, reference)


def test_four_processes_train_as_one_with_fewer_samples_than_ranks_too(references):
    folder, jobs, expected = references, [], {}
    for number, engine in enumerate(ENGINES):
        optimizer = list(OPTIMIZERS)[number % len(OPTIMIZERS)]
        table = list(TABLES)[(number + 1) % len(TABLES)]
        few = [*OPTIMIZERS["sgd"], "train.global_batch=3"]
        for reference, overrides in ((f"one {optimizer}", OPTIMIZERS[optimizer]), ("one few", few)):
            name = f"four {reference} {engine}"
            engine_key = f"train.engine={ENGINES[engine]}"
            jobs.append({**asked(folder, name, engine_key, *overrides, TABLES[table]), "dirty": True})
            expected[name] = reference
    assert run_jobs(folder, jobs, 4) == [[None] * 4] * len(jobs)
    for name, reference in expected.items():
        assert_alike(folder, name, reference)


def test_one_process_trains_under_every_engine(references):
    folder = references
    jobs = [
        asked(folder, f"alone {engine}", f"train.engine={ENGINES[engine]}", *OPTIMIZERS["clipped"], ODD)
        for engine in OTHERS
    ]
    assert run_jobs(folder, jobs, 1) == [[None]] * len(jobs)
    for engine in OTHERS:
        assert_alike(folder, f"alone {engine}", "one odd")
    dense = {
        n: v for n, v in weights(folder / "one-odd").items() if n.startswith("model/") and "tables" not in n
    }
    assert sum(value.numel() for value in dense.values()) % 2 == 1


def test_bfloat16_and_activation_checkpointing(folder):
    """In bfloat16 a number that float32 rounds otherwise may move by 2^-8 of its size, a loss by less.  Layers that are
    formed again give the same bits as those that were kept."""
    jobs = []
    for engine in ("ddp", "fsdp", "zero2", "zero3 in parts"):
        chosen = [f"train.engine={ENGINES[engine]}", *OPTIMIZERS["adamw"], "train.max_steps=3"]
        jobs.append(asked(folder, f"bf16 {engine}", *chosen, "train.precision=bf16"))
        for again in (False, True) if engine != "zero2" else ():
            wanted = [*chosen, f"train.activation_checkpointing={str(again).lower()}"]
            dropped = ["model.input.dropout=0.2", "model.encoder.dropout=0.2"]
            jobs.append(asked(folder, f"again {again} {engine}", *wanted, *dropped))
    assert run_jobs(folder, jobs, 2) == [[None, None]] * len(jobs)
    for engine in ("fsdp", "zero2", "zero3 in parts"):
        assert_alike(
            folder, f"bf16 {engine}", "bf16 ddp", loss=UNIT[torch.bfloat16], weight=16 * UNIT[torch.bfloat16]
        )
    for engine in ("ddp", "fsdp", "zero3 in parts"):
        kept, formed = (weights(folder / f"again {a} {engine}".replace(" ", "-")) for a in (False, True))
        first, second = (rows(folder, f"again {a} {engine}") for a in (False, True))
        for one, other in zip(first, second, strict=True):  # which count what they formed again
            assert other.pop("flops") > one.pop("flops")
            other.pop("pflop_days"), one.pop("pflop_days")
        assert first == second
        assert all(torch.equal(kept[name], formed[name]) for name in kept)


def test_bfloat16_reaches_the_layers_of_every_engine(references):
    """The first loss, of the same parameters, is to the bit what autocast around DDP's model gives, and no other."""
    folder = references
    jobs = [
        asked(
            folder, f"rounded {engine}", f"train.engine={value}", *OPTIMIZERS["sgd"], "train.precision=bf16"
        )
        for engine, value in ENGINES.items()
    ]
    assert run_jobs(folder, jobs, 1) == [[None]] * len(jobs)
    first = {engine: rows(folder, f"rounded {engine}")[0]["loss"] for engine in ENGINES}
    assert set(first.values()) == {first["ddp"]}
    assert first["ddp"] != rows(folder, "one sgd")[0]["loss"]


def test_a_ranking_model_is_gathered_to_be_evaluated(tmp_path):
    make_ranking_dataset(tmp_path / "data")
    jobs = []
    for engine in ("ddp", "fsdp", "zero3 in parts"):
        run = tmp_path / f"ranking-{engine.replace(' ', '-')}"
        file = tmp_path / f"{run.name}.yaml"
        file.write_text(RANKING.format(run=run, data=tmp_path / "data"))
        given = [f"train.engine={ENGINES[engine]}", "train.max_steps=6", "optimizer={name: sgd, lr: 0.5}"]
        no_dropout = [
            "model.input.dropout=0",
            "model.encoder.dropout=0",
            "eval.splits=[test]",
            "eval.batch=37",
        ]
        jobs.append({"config": file, "overrides": [*given, *no_dropout, "train.micro_batch_actions=60"]})
    assert run_jobs(tmp_path, jobs, 2) == [[None, None]] * len(jobs)
    for engine in ("fsdp", "zero3 in parts"):
        assert_alike(tmp_path, f"ranking {engine}", "ranking ddp", metric="auc/like")


def test_a_step_whose_gradients_are_not_numbers_stops_the_run(folder):
    """DeepSpeed leaves such a step out, and would go on."""
    whole = "train.micro_batch_actions=65536"
    jobs = [
        {
            **asked(folder, f"broken {engine}", f"train.engine={value}", whole, "checkpoint.every_steps=2"),
            "broken_at": 3,
        }
        for engine, value in ENGINES.items()
    ]
    for said, engine in zip(run_jobs(folder, jobs, 2), ENGINES, strict=True):
        for sentence in said:
            # elsewhere it shows in the next step's loss, or before anything is saved
            assert "of step 3 is not finite" in sentence or "of step 4 is not finite" in sentence, (
                engine,
                said,
            )
            assert "step-00000002" in sentence
            if "zero" in engine:
                assert sentence.startswith("the update of step 3 is not finite")


def test_a_stage_that_is_none_is_refused_once(folder):
    config = write_config(folder, folder / "data", folder / "four")
    given = ["--config", config, "train.engine={name: deepspeed, zero: 4}"]
    done = in_ranks(command(given), [folder, folder])
    assert [one.returncode for one in done] == [2, 2]
    (said,) = "".join(one.stderr for one in done).splitlines()
    assert "train.engine.zero" in said and "less than or equal to 3" in said


def test_without_deepspeed_one_sentence_names_what_installs_it(folder):
    hiding = folder / "hiding" / "deepspeed"
    hiding.mkdir(parents=True)
    (hiding / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'deepspeed'\")\n")
    paths = os.pathsep.join([str(hiding.parent), os.environ["PYTHONPATH"]])
    config = write_config(folder, folder / "data", folder / "missing")
    given = ["--config", config, "train.engine=deepspeed"]
    done = run_python(command(given, 2), environment={"PYTHONPATH": paths})
    assert done.returncode != 0
    assert str(ROOT / "gr") not in done.stderr, "a traceback, beside torchrun's own"
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == (
        "error: train.engine is deepspeed, and it can't be imported (No module named 'deepspeed'): make setup-sharded "
        "installs it, or use train.engine=fsdp"
    )


def test_zero_belongs_to_deepspeed(folder):
    (refusal,) = run_jobs(folder, [asked(folder, "zero of ddp", "train.engine={name: ddp, zero: 1}")], 1)
    assert "train.engine.zero" in json.dumps(refusal)
