"""The loss is a sum over the global batch divided by its targets: processes and micro-batches change nothing."""

import numpy as np
import pytest

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import adamw, of_losses, of_weights
from tests.end_to_end.tiny import make_dataset, weights, write_config

NO_DROPOUT = ["model.input.dropout=0", "model.encoder.dropout=0", "train.max_steps=12"]
STEPS, RATE = 12, 0.01
LOSS_TOLERANCE, WEIGHT_TOLERANCE = of_losses(STEPS), of_weights(STEPS, adamw(RATE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    make_dataset(path / "data")
    return path


def run(folder, processes, **jobs):
    """Run each of ``jobs`` (overrides by name) on so many processes."""
    asked = [
        {
            "config": write_config(folder, folder / "data", folder / name),
            "overrides": [*NO_DROPOUT, *overrides],
        }
        for name, overrides in jobs.items()
    ]
    assert run_jobs(folder, asked, processes) == [[None] * processes] * len(jobs)


def trained(folder, name):
    rows = [r for r in RunFolder(folder / name).read_metrics() if r["kind"] == "train"]
    tensors = {k: v for k, v in weights(folder / name).items() if k.startswith("model/")}
    return rows, tensors


OBJECTIVES = {
    "own": [],
    "shared": ["objective.shared=true"],
    "in_batch": ["objective={name: in_batch}"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_two_and_four_processes_and_micro_batches_train_alike(folder, objective):
    one, micro, two, four = (f"{objective}-{kind}" for kind in ("one", "micro", "two", "four"))
    overrides = OBJECTIVES[objective]
    run(folder, 1, **{one: overrides, micro: [*overrides, "train.micro_batch_actions=60"]})
    run(folder, 2, **{two: overrides})
    if objective == "own":
        run(folder, 4, **{four: overrides})
    rows, tensors = trained(folder, one)
    for name in (micro, two, *[four] * (objective == "own")):
        other_rows, other_tensors = trained(folder, name)
        assert [r["data_digest"] for r in other_rows] == [r["data_digest"] for r in rows], name
        assert [r["targets"] for r in other_rows] == [r["targets"] for r in rows], name
        np.testing.assert_allclose(
            [r["loss"] for r in other_rows], [r["loss"] for r in rows], rtol=LOSS_TOLERANCE, err_msg=name
        )
        for key, tensor in tensors.items():
            np.testing.assert_allclose(
                other_tensors[key], tensor, atol=WEIGHT_TOLERANCE, rtol=0, err_msg=f"{name} {key}"
            )
