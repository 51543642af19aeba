"""Paired hits: against hits and probabilities counted by hand, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

from gr import config as configs
from gr.data.making.sources.synthetic_dp import Oracle, StreamOptions, SyntheticDP
from gr.errors import UserError
from gr.train import job
from gr.train.reproduction import reproduce as reproduction
from gr.train.reproduction.paired import Mean, paired, to_json
from gr.train.runs import open_run

STREAM = {"records": 600, "length": 12, "items": 60, "categories": 6, "alpha_max": 20, "repeats": False}
CONFIG = """
data: {{path: {data}, max_length: 11, order: stream, split: {{name: records, train: 0.5}}}}
model: {{dim: 8, encoder: {{name: hstu, layers: 1, heads: 1, qk_dim: 8, v_dim: 8, relative_time: false}}}}
objective: {{name: sampled_softmax, negatives: 8}}
optimizer: {{name: adamw, lr: 0.01}}
train: {{global_batch: 32, max_steps: 3, threads: 1}}
eval: {{exclude: none, buckets: false, batch: 64}}
run: {{dir: {run}}}
"""


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    path = tmp_path_factory.mktemp("paired")
    SyntheticDP(StreamOptions(**STREAM)).prepare(None, str(path / "data"))
    return path


def train(stream, name, *overrides):
    file = stream / f"{name}.yaml"
    if not (stream / name).exists():
        file.write_text(CONFIG.format(data=stream / "data", run=stream / name))
        job.run(configs.load(file, overrides))
    return stream / name


def test_a_mean_has_the_textbook_standard_error():
    values = torch.tensor([0.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    mean = Mean.of(values)
    assert mean.mean == 1.5
    assert mean.error == pytest.approx(np.std(values.numpy(), ddof=1) / 2)


def test_hits_and_their_worth_are_what_counting_gives(stream):
    runs = {"one": train(stream, "one"), "two": train(stream, "two", "train.seed=2")}
    rows = paired(runs, k=5)
    assert [r.name for r in rows] == ["one", "two", "oracle"] and {r.users for r in rows} == {300}

    hits, worth = {}, {}
    first = open_run(runs["one"])
    oracle = Oracle(first.data.dataset)
    from gr.train.evaluation import Evaluation

    data = first.data
    requests = list(Evaluation(data.dataset, data.split, first.config, data.catalogue).requests("test"))
    for name, scorer in {"one": first.model, "two": open_run(runs["two"]).model, "oracle": oracle}.items():
        hits[name], worth[name] = [], []
        for request in requests:
            with torch.no_grad():
                scores = scorer.scores(request.batch).numpy()
            probability = oracle.scores(request.batch).numpy().astype(np.float64)
            for user, target in enumerate(request.targets_B.tolist()):
                best = np.argsort(-scores[user], kind="stable")[:5]
                hits[name].append(float(target in best))
                worth[name].append(probability[user, best].sum())
    for row in rows:
        assert row.hits.mean == pytest.approx(np.mean(hits[row.name]))
        assert row.expected.mean == pytest.approx(np.mean(worth[row.name]))
        assert row.share == pytest.approx(np.mean(worth[row.name]) / np.mean(worth["oracle"]))
    difference = np.subtract(hits["two"], hits["one"])
    assert rows[1].hits_above.mean == pytest.approx(difference.mean())
    assert rows[1].hits_above.error == pytest.approx(difference.std(ddof=1) / math.sqrt(300))
    above = np.subtract(worth["two"], worth["one"])
    assert rows[1].expected_above.mean == pytest.approx(above.mean())
    assert rows[1].expected_above.error == pytest.approx(above.std(ddof=1) / math.sqrt(300))
    assert rows[0].hits_above is None and rows[2].hits_above is None
    assert json.loads(json.dumps(to_json(rows)))[1]["hits"]["mean"] == rows[1].hits.mean


def test_nothing_is_worth_more_than_the_oracle_and_its_hits_agree_with_their_expectation(stream):
    one, oracle = paired({"one": train(stream, "one")}, k=10)
    assert one.share < 1 and oracle.share == 1
    assert abs(oracle.hits.mean - oracle.expected.mean) < 4 * oracle.hits.error


def test_runs_that_cannot_be_paired_are_refused(stream):
    one = train(stream, "one")
    filtered = train(stream, "filtered", "eval.exclude=kept")
    with pytest.raises(UserError, match=r"takes items out of the ranking \(eval.exclude=kept\)"):
        paired({"one": one, "filtered": filtered})
    other = train(stream, "other", "data.split.train=0.6")
    with pytest.raises(UserError, match="different data or splits"):
        paired({"one": one, "other": other})


def test_a_stream_of_other_options_is_not_the_tables(stream):
    path, other = str(stream / "data"), dict(STREAM, length=32)
    with pytest.raises(UserError, match=r"was made with length=12, and the table of 'synthetic-dp' needs 32"):
        reproduction._check_options("synthetic-dp", other, path)
    reproduction._check_options("synthetic-dp", STREAM, path)
