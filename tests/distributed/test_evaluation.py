"""Evaluation over processes: the same users, ranks and bits as with one."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr.config import DataSection, EvalSection, RunConfig
from gr.data.dataset import SequenceDataset
from gr.data.popularity import training_sequences
from gr.data.requests import requests
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.eval.baselines import ItemKNN
from gr.processes import Axis, Processes, processes
from gr.train.evaluation import Evaluation
from gr.train.parts import Catalogue
from tests.distributed.group import in_group

ITEMS, USERS = 40, 61
CASES: dict = {"all": {"cold": 3}, "subset": {"max_users": 17, "exclude": "all"}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, USERS)
    rows = Sequences.of(
        np.arange(USERS),
        np.concatenate([[0], np.cumsum(lengths)]),
        item=(rng.integers(0, ITEMS, lengths.sum()) * rng.random(lengths.sum())).astype(np.int32),
    )
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    writer = DatasetWriter(folder, "test", block_rows=8)
    writer.add(rows)
    writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": np.zeros(ITEMS, np.int64)}))
    return str(folder)


def settings(path: str, **changes) -> RunConfig:
    """A run's config as far as an evaluation reads it."""
    evaluation = {"splits": ["valid", "test"], "ks": [1, 5, 10], "batch": 5, "max_scores": 90, **changes}
    split = LeaveOneOut.Config(holdout=2)
    return RunConfig.model_construct(
        data=DataSection(path=path, max_length=7, split=split), eval=EvalSection(**evaluation)
    )


def opened(path: str, **changes):
    config = settings(path, **changes)
    return SequenceDataset(path), LeaveOneOut(config.data.split), config


def evaluating(path: str, joined: Processes | None = None, **changes) -> Evaluation:
    dataset, split, config = opened(path, **changes)
    return Evaluation(dataset, split, config, Catalogue(dataset, split), processes=joined)


class Likely:
    """Probabilities, others for each user, so that there are losses."""

    gives_probabilities = True

    def scores(self, batch):
        return (1.0 + batch.ordinals_B[:, None] * torch.arange(ITEMS) % 7).softmax(1)


class Diverged:
    """NaN for the user of one ordinal."""

    collective = False

    def __init__(self, ordinal: int):
        self.ordinal = ordinal

    def scores(self, batch):
        scores = torch.zeros(batch.sequences, ITEMS)
        scores[batch.ordinals_B == self.ordinal, 3] = torch.nan
        return scores


class DivergedTogether(Diverged):
    """The same, with an exchange whenever somebody asks: a process that stops alone would leave the others waiting."""

    collective = True

    def __init__(self, ordinal: int, world: Axis):
        super().__init__(ordinal)
        self.world = world

    def scores(self, batch):
        self.world.sum([batch.sequences], dtype=torch.int64)
        return super().scores(batch)


def measure(path: str, joined: Processes | None = None, **changes) -> dict:
    """What this process gets to know, alone or as one of a group."""
    dataset, split, config = opened(path, **changes)
    evaluation = evaluating(path, joined, **changes)
    scorer = ItemKNN(neighbours=6).fit(training_sequences(dataset, split), ITEMS)
    knn = evaluation.run("test", scorer)
    again = evaluation.run("test", scorer)
    assert knn.row() == again.row() and knn.buckets == again.buckets
    popular = evaluation.baselines("valid", ["popularity"])["popularity"]
    likely = evaluation.run("test", Likely())
    every = requests(dataset, split, "test", max_length=7, max_users=config.eval.max_users)
    third = int(next(iter(every)).batch.ordinals_B[2])
    with pytest.raises(UserError) as refusal:
        evaluation.run("test", Diverged(third))  # one rank has it; all must stop
    world = Axis() if joined is None else joined.world
    with pytest.raises(UserError, match=r"NaN for 1 users|failed on 1 other"):
        evaluation.run("test", DivergedTogether(third, world))
    return {
        "knn": [knn.row(), knn.buckets],
        "popularity": [popular.row(), popular.buckets],
        "likely": [likely.row(), likely.buckets],
        "refusal": str(refusal.value),
    }


def measured(path: str) -> str:
    with processes("cpu", threads=1) as joined:
        assert (joined.world.size, joined.data.size, joined.local.size) == (2, 2, 2)
        return json.dumps({name: measure(path, joined, **changes) for name, changes in CASES.items()})


def test_two_processes_measure_what_one_does(path, tmp_path):
    ranks = [json.loads(said) for said in in_group(measured, 2, tmp_path / "group", path, by_hand=False)]
    for name, changes in CASES.items():
        alone = json.loads(json.dumps(measure(path, **changes)))
        for rank in ranks:
            assert rank[name]["knn"] == alone["knn"], "not the same bits"
            assert rank[name]["popularity"] == alone["popularity"]
            assert rank[name]["likely"] == alone["likely"]
        row = alone["knn"][0]
        assert row["users"] == changes.get("max_users", row["users"]) > 10
        assert ("of_users" in row) == ("max_users" in changes)
        assert 0 < row["hr@10"] < 1 and alone["likely"][0]["loss"] > 1
        assert ("cold" in changes) == (0 < row.get("users/cold", 0) < row["users"])
        refusals = sorted(rank[name]["refusal"] for rank in ranks)
        assert alone["refusal"].startswith("Diverged scored items as NaN for 1 users")
        assert refusals[0] == alone["refusal"]
        assert refusals[1] == "the evaluation failed on 1 other processes: see their messages"


def test_every_user_with_a_target_is_measured_once(path):
    dataset, split, config = opened(path)
    lengths = np.concatenate([dataset.read_block(b).lengths_R for b in range(len(dataset.manifest.blocks))])
    result = evaluating(path).run("test", Diverged(-1))
    assert result.users == result.population == (lengths >= 2).sum()
    assert "of_users" not in result.row()
    assert sum(b["users"] for b in result.buckets["history"]) == result.users
    # no score differs: half of the items that are left, whatever the history
    assert result.metrics["hr@1"] == 0 and result.metrics["mrr"] < 1 / 10


def test_baselines_do_not_see_held_out_actions(path, tmp_path):
    """Other items in the held-out places change nothing that is fitted."""
    dataset, split, config = opened(path)
    rows = dataset.read_rows(0, USERS)
    items = rows.items_A.copy()
    last = rows.offsets_R1[1:]
    items[last - 1] = ITEMS - 1
    has_two = rows.lengths_R >= 2
    items[last[has_two] - 2] = ITEMS - 2
    writer = DatasetWriter(tmp_path / "other", "other", block_rows=8)
    writer.add(Sequences.of(rows.users_R, rows.offsets_R1, item=items))
    other = writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": np.zeros(ITEMS, np.int64)}))
    assert other.manifest.fingerprint != dataset.manifest.fingerprint
    for name in ("popularity", "last_item", "item_knn"):
        mine = evaluating(path).baseline(name)
        theirs = evaluating(str(tmp_path / "other")).baseline(name)
        for request in evaluating(path).requests("test"):
            assert torch.equal(mine.scores(request.batch), theirs.scores(request.batch))


def test_baselines_by_config_and_by_name(path):
    evaluation = evaluating(path, baselines=["popularity", "last_item"], exclude="none")
    results = evaluation.baselines("test")
    assert list(results) == ["popularity", "last_item"]
    with pytest.raises(UserError, match="did you mean 'popularity'"):
        evaluation.baselines("test", ["popularty"])
    with pytest.raises(UserError, match="the oracle knows synthetic-dp streams only"):
        evaluation.baselines("test", ["oracle"])


def test_a_split_without_users_is_an_error(path):
    dataset, split, config = opened(path)
    dataset.manifest.blocks[1:] = []
    rows = dataset.read_block(0)
    split.target = lambda r, name, users: np.full(len(rows), -1)
    with pytest.raises(UserError, match="has a held-out action in split 'test'"):
        Evaluation(dataset, split, config, Catalogue(dataset, split)).run("test", Diverged(-1))
