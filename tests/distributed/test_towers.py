"""Towers over two processes: each item of a step is encoded by one of them, what has a row an item is on all of them or
dealt out with the table, and nothing changes but rounding."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gr.data.dataset import SequenceDataset
from gr.modality.digest import Sketch
from gr.modality.reader import TextReader, TextSection
from gr.modality.vectors import as_table
from gr.processes import Processes
from gr.train.checkpoint import read_state
from gr.train.folder import RunFolder
from tests.distributed.jobs import run_jobs
from tests.distributed.rounding import of_losses, of_weights, sgd
from tests.end_to_end.tiny import CONFIG, weights
from tests.packages import needs
from tests.towers import make_encoder, make_titled

needs("transformers", "torchrec", "fbgemm_gpu")
RATE, TERMS, STEPS = 0.1, 16 * 17 * 20, 3
# its steps are as large as the gradients: a wrong scale would show
PLAIN = [
    *("model.input.dropout=0", "model.encoder.dropout=0", f"train.max_steps={STEPS}", "train.clip_norm=null"),
    *(f"optimizer={{name: sgd, lr: {RATE}}}", "eval.splits=[test]"),
]


def test_two_processes_tune_and_evaluate_as_one_does(tmp_path):
    make_titled(tmp_path / "data")
    encoder = str(make_encoder(tmp_path / "encoder"))
    tiny = TextSection(encoder=encoder)
    catalogue = SequenceDataset(tmp_path / "data").catalogue
    reader = TextReader(tiny, Processes(torch.device("cpu")))
    found = reader.encoded(reader.encoder(), reader.items(catalogue)).own_RE
    pq.write_table(as_table(catalogue.ids, found), tmp_path / "vectors.parquet", row_group_size=7)
    text, of_file = {"text": {"encoder": encoder}}, {"vectors": str(tmp_path / "vectors.parquet")}
    towers = {
        "tuned": ("local", {"name": "text", "mode": "tuned", **text}),
        "frozen": ("local", {"name": "fused", "fusion": "gated", **text}),
        "refreshed": ("local", {"name": "text", "mode": "tuned", "refresh": 2, **text}),
        "refreshed-dealt": ("mapped", {"name": "fused", "mode": "tuned", "refresh": 2, **text}),
        "tuned-dealt": ("mapped", {"name": "fused", "mode": "tuned", **text}),
        "frozen-dealt": ("mapped", {"name": "text", **text}),
        "cached-dealt": ("torchrec", {"name": "fused", "fusion": "gated", "mode": "cached", **of_file}),
        "started": ("torchrec", {"name": "id", "start": of_file}),
    }
    few = {"refreshed": 2, "refreshed-dealt": 1, "frozen": 1}  # of one user a process has no share

    def run(processes):
        jobs = []
        for name, (table, tower) in towers.items():
            file = tmp_path / f"{name}-{processes}.yaml"
            file.write_text(CONFIG.format(run=tmp_path / file.stem, data=tmp_path / "data"))
            asked = [f"model.item_tower={json.dumps(tower)}", f"model.table={table}", *PLAIN]
            if name in few:  # most items stand in no sequence of these
                asked.append(f"train.global_batch={few[name]}")
            jobs.append({"config": file, "overrides": asked})
        # of one file a vector is missing that the last process alone looks for
        lacking = tmp_path / "lacking.parquet"
        pq.write_table(as_table(catalogue.ids[:-1], found[:-1]), lacking)
        cached = jobs[[*towers].index("cached-dealt")]
        asked = [*cached["overrides"], f"model.item_tower.vectors={lacking}", "model.table=mapped"]
        jobs.append({"config": cached["config"], "overrides": asked})
        *said, refused = run_jobs(tmp_path, jobs, processes)
        assert said == [[None] * processes] * len(towers)
        assert all("has no vector for 1 of" in sentence for sentence in refused)

    run(1)
    (tmp_path / "data/vectors").rename(tmp_path / "vectors")
    run(2)
    # encoded with one thread by one process and by two
    (of_one,), (of_two,) = (
        list(path.iterdir()) for path in (tmp_path / "vectors", tmp_path / "data/vectors")
    )
    assert of_one.name == of_two.name and pq.read_table(of_one).equals(pq.read_table(of_two))
    for name in towers:
        folders = [tmp_path / f"{name}-{processes}" for processes in (1, 2)]
        one, two = ([r for r in RunFolder(f).read_metrics() if r["kind"] == "train"] for f in folders)
        losses = [[r["loss"] for r in rows] for rows in (one, two)]
        np.testing.assert_allclose(*losses, rtol=of_losses(STEPS, TERMS), err_msg=name)
        # no item is encoded twice
        assert [r["flops"] for r in two] == pytest.approx([r["flops"] for r in one], rel=1e-9), name
        figures = [[r for r in RunFolder(f).read_metrics() if r["kind"] == "eval"][-1] for f in folders]
        assert abs(figures[0]["mrr"] - figures[1]["mrr"]) < 0.02, "but for a pair of items that change places"
        if towers[name][1]["name"] != "id":
            assert abs(figures[0]["item_rank"] - figures[1]["item_rank"]) < 1e-3
        if "vectors" in towers[name][1]:
            paths = [sorted((f / "checkpoints").glob("step-*"))[-1] for f in folders]
            of_one, of_two = (Sketch(**read_state(path)["vectors"]["items"]) for path in paths)
            assert of_one.sums == pytest.approx(of_two.sums) and not of_one.differs(of_two)
        tensors, other = map(weights, folders)
        assert tensors.keys() == other.keys()
        assert ("kept/items/content" in tensors) == ("refresh" in towers[name][1])
        for key in (key for key in tensors if key.startswith(("model/", "kept/"))):
            bound = of_weights(STEPS, sgd(RATE), TERMS)
            torch.testing.assert_close(other[key], tensors[key], rtol=0, atol=bound, msg=f"{name} {key}")
