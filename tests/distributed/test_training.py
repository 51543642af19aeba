"""The loss is a sum over the global batch divided by its targets: processes and micro-batches change nothing."""

import numpy as np
import pytest

from gr.train.folder import RunFolder
from tests.end_to_end.tiny import make_dataset, train, weights, write_config

NO_DROPOUT = ["model.input.dropout=0", "model.encoder.dropout=0", "train.max_steps=12"]
# Sums of a few hundred float32 terms in another order differ by about 1e-6 of their size; twelve AdamW steps, whose
# first divide gradients by their own size, carry that into the parameters at about 1e-4 of a step of lr = 0.01.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 2e-4


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
