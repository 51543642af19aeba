"""The loss is a sum over the global batch divided by its targets: processes and micro-batches change nothing."""

import numpy as np
import pytest

from gr.train.folder import RunFolder
from tests.end_to_end.tiny import make_dataset, train, weights, write_config
from tests.precision import after_steps

NO_DROPOUT = ["model.input.dropout=0", "model.encoder.dropout=0", "train.max_steps=12"]
# The sums are over the targets of a batch, 16 users of up to 20 actions, in another order; a loss has at most twice the
# relative change of the parameters (test_golden_losses.py). Both runs round.
STEPS, LR, TERMS = 12, 0.01, 16 * 20
LOSS_TOLERANCE = 2 * after_steps(STEPS, TERMS, condition=2.0)
# AdamW moves a parameter by up to lr times its gradient over the gradient's own size: by lr times the gradient's
# relative error more or less, which grows where the terms cancel. They do so down to 1 / 200 of their sizes here.
CANCELLATION = 200
WEIGHT_TOLERANCE = LR * after_steps(STEPS, TERMS, condition=2.0) * CANCELLATION


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    make_dataset(path / "data")
    return path


def run(folder, name, overrides=(), processes=1):
    path = folder / name
    train(["--config", write_config(folder, folder / "data", path), *NO_DROPOUT, *overrides], processes)
    rows = [r for r in RunFolder(path).read_metrics() if r["kind"] == "train"]
    tensors = {k: v for k, v in weights(path).items() if k.startswith("model/")}
    return rows, tensors


OBJECTIVES = {
    "own": [],
    "shared": ["objective.shared=true"],
    "in_batch": ["objective={name: in_batch}"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_two_and_four_processes_and_micro_batches_train_alike(folder, objective):
    overrides = OBJECTIVES[objective]
    rows, tensors = run(folder, f"{objective}-one", overrides)
    others = {"micro": run(folder, f"{objective}-micro", [*overrides, "train.micro_batch_actions=60"])}
    for processes in (2, 4) if objective == "own" else (2,):
        others[f"{processes} processes"] = run(folder, f"{objective}-{processes}", overrides, processes)
    for name, (other_rows, other_tensors) in others.items():
        assert [r["data_digest"] for r in other_rows] == [r["data_digest"] for r in rows], name
        assert [r["targets"] for r in other_rows] == [r["targets"] for r in rows], name
        np.testing.assert_allclose(
            [r["loss"] for r in other_rows], [r["loss"] for r in rows], rtol=LOSS_TOLERANCE, err_msg=name
        )
        for key, tensor in tensors.items():
            np.testing.assert_allclose(
                other_tensors[key], tensor, atol=WEIGHT_TOLERANCE, rtol=0, err_msg=f"{name} {key}"
            )
