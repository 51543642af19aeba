"""A tuned tower over two processes: each item of a step is encoded by one of them, and nothing changes but rounding."""

from __future__ import annotations

import json

import numpy as np
import torch

from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import of_losses, of_weights, sgd
from tests.end_to_end.tiny import CONFIG, weights
from tests.packages import needs
from tests.towers import make_encoder, make_titled

needs("transformers")
RATE, TERMS, STEPS = 0.1, 16 * 17 * 20, 3
# its steps are as large as the gradients: a wrong scale would show
PLAIN = [
    *("model.input.dropout=0", "model.encoder.dropout=0", f"train.max_steps={STEPS}", "train.clip_norm=null"),
    *(f"optimizer={{name: sgd, lr: {RATE}}}", "eval.splits=[test]"),
]


def test_two_processes_tune_and_evaluate_as_one_does(tmp_path):
    make_titled(tmp_path / "data")
    encoder = str(make_encoder(tmp_path / "encoder"))
    towers = {
        "tuned": {"name": "text", "mode": "tuned", "text": {"encoder": encoder}},
        "frozen": {"name": "fused", "fusion": "gated", "text": {"encoder": encoder}},
    }

    def run(processes):
        jobs = []
        for name, tower in towers.items():
            file = tmp_path / f"{name}-{processes}.yaml"
            file.write_text(CONFIG.format(run=tmp_path / file.stem, data=tmp_path / "data"))
            jobs.append({"config": file, "overrides": [f"model.item_tower={json.dumps(tower)}", *PLAIN]})
        assert run_jobs(tmp_path, jobs, processes) == [[None] * processes] * len(jobs)

    run(1)
    run(2)
    for name in towers:
        folders = [tmp_path / f"{name}-{processes}" for processes in (1, 2)]
        one, two = ([r for r in RunFolder(f).read_metrics() if r["kind"] == "train"] for f in folders)
        losses = [[r["loss"] for r in rows] for rows in (one, two)]
        np.testing.assert_allclose(*losses, rtol=of_losses(STEPS, TERMS), err_msg=name)
        tensors, other = map(weights, folders)
        assert tensors.keys() == other.keys()
        for key in (key for key in tensors if key.startswith("model/")):
            bound = of_weights(STEPS, sgd(RATE), TERMS)
            torch.testing.assert_close(other[key], tensors[key], rtol=0, atol=bound, msg=f"{name} {key}")
