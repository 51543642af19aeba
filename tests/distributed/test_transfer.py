"""Adapters over two processes: what is frozen stays so on both, and nothing changes but rounding."""

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
PLAIN = [
    *("model.input.dropout=0", "model.encoder.dropout=0", f"train.max_steps={STEPS}", "train.clip_norm=null"),
    *(f"optimizer={{name: sgd, lr: {RATE}}}", "eval.splits=[test]"),
]
# in both encoders; in the items' alone, so that nothing of what an engine wraps trains; in the sequences' alone
PARTS = {
    "both": ["model.adapters={name: lora, size: 4}"],
    "item": ["model.adapters=frozen"],
    "user": ["model.adapters={name: houlsby, size: 4}", "model.item_tower.adapters=frozen"],
}


def test_two_processes_adapt_as_one_does(tmp_path):
    make_titled(tmp_path / "data")
    text = {"encoder": str(make_encoder(tmp_path / "encoder"))}

    def job(name, tower, *overrides):
        file = tmp_path / f"{name}.yaml"
        file.write_text(CONFIG.format(run=tmp_path / name, data=tmp_path / "data"))
        asked = f"model.item_tower={json.dumps({'name': 'text', 'text': text, **tower})}"
        return {"config": file, "overrides": [asked, *PLAIN, *overrides]}

    tower = {"mode": "adapters", "adapters": {"name": "houlsby", "size": 4}, "head": {"frozen": True}}
    start = f"train.start_from={tmp_path / 'source'}"
    for processes in (1, 2):
        jobs = [job("source", {"mode": "tuned"})] * (processes == 1)
        jobs += [job(f"{name}-{processes}", tower, start, *changes) for name, changes in PARTS.items()]
        assert run_jobs(tmp_path, jobs, processes) == [[None] * processes] * len(jobs)
    for name in PARTS:
        folders = [tmp_path / f"{name}-{processes}" for processes in (1, 2)]
        one, two = ([r for r in RunFolder(f).read_metrics() if r["kind"] == "train"] for f in folders)
        losses = [[r["loss"] for r in rows] for rows in (one, two)]
        np.testing.assert_allclose(*losses, rtol=of_losses(STEPS, TERMS), err_msg=name)
        tensors, other = map(weights, folders)
        assert tensors.keys() == other.keys() and all("adapter" in key for key in tensors)
        for key in (key for key in tensors if key.startswith("model/")):
            bound = of_weights(STEPS, sgd(RATE), TERMS)
            torch.testing.assert_close(other[key], tensors[key], rtol=0, atol=bound, msg=f"{name} {key}")
