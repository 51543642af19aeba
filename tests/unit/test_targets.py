"""The rule behind a number: what kinds of targets there are, counted once, and what the tables say."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from gr import config as configs
from gr.data.dataset import SequenceDataset
from gr.data.requests import requests
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.targets import TargetKinds
from gr.data.writing import DatasetWriter
from gr.eval.tables import results_table
from gr.train.comparison import compare, to_json
from gr.train.evaluation import Evaluation
from gr.train.job import run
from gr.train.parts import open_data
from tests.end_to_end.tiny import CONFIG

ITEMS, USERS = 90, 90


def make_dataset(path, times=True):
    """Few items, so that many repeat; the last ones are rare, so that some never train; many ties."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 12, USERS)
    actions = lengths.sum()
    items = (ITEMS * rng.random(actions) ** 4).astype(np.int32)
    time = {"time": np.arange(actions, dtype=np.int64) // 3 * 100} if times else {}
    writer = DatasetWriter(path, "kinds", block_rows=16)
    writer.add(Sequences.of(np.arange(USERS), np.concatenate([[0], np.cumsum(lengths)]), item=items, **time))
    return writer.finish(
        pa.table({"item_id": np.arange(ITEMS), "count": np.bincount(items, minlength=ITEMS)})
    )


def by_hand(dataset: SequenceDataset, back: int, only=None) -> dict[str, float]:
    """Shares of the targets ``back`` places from the end of each sequence, under leave-one-out with two held out."""
    rows = dataset.read_rows(0, USERS)
    items = np.split(rows.items_A, rows.offsets_R1[1:-1])
    trained = set(np.concatenate([own[:-2] for own in items]).tolist())
    found = []
    for ordinal, own in enumerate(items):
        place = len(own) - back
        if place < 1 or (only is not None and ordinal not in only):
            continue
        flags = [own[place] not in trained, own[place] in own[:place]]
        if rows.timestamps_A is not None:
            times = rows.timestamps_A[rows.offsets_R1[ordinal] :]
            flags.append(times[place] == times[place - 1])
        found.append(flags)
    names = ("cold_targets", "repeated_targets", "tied_targets")
    return dict(zip(names, np.mean(found, axis=0).tolist()))


def configured(folder, *overrides):
    file = folder / "kinds.yaml"
    file.write_text(CONFIG.format(run=folder / "run", data=folder / "data"))
    return configs.load(file, ["data.max_length=3", "eval.batch=7", *overrides])


@pytest.mark.parametrize("times", [True, False])
def test_shares_are_those_counted_by_hand(tmp_path, times):
    dataset = make_dataset(tmp_path / "data", times)
    without = [] if times else ["model.encoder.relative_time=false"]
    config = configured(tmp_path, *without)
    data = open_data(config)
    evaluation = Evaluation(data.dataset, data.split, config, data.catalogue, columns={"item"})
    for split, back in (("test", 1), ("valid", 2)):
        wanted = by_hand(dataset, back)
        assert all(0 < share < 1 for share in wanted.values()), "a kind that the case has none of, or all"
        assert len(wanted) == 2 + times
        for _ in range(2):
            row = evaluation.run(split, evaluation.baseline("popularity")).row()
            assert {key: row[key] for key in row if key.endswith("_targets")} == pytest.approx(
                wanted, abs=1e-12
            )
            assert row["exclude"] == "kept"


def test_of_a_subset_its_own_targets_are_counted(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    config = configured(tmp_path, "eval.max_users=20")
    data = open_data(config)
    evaluation = Evaluation(data.dataset, data.split, config, data.catalogue)
    chosen = [int(o) for request in evaluation.requests("test") for o in request.batch.ordinals_B]
    row = evaluation.run("test", evaluation.baseline("popularity")).row()
    assert row["users"] == len(chosen) == 20
    assert row["tied_targets"] == pytest.approx(by_hand(dataset, 1, chosen)["tied_targets"], abs=1e-12)


def test_processes_count_their_own_and_a_broken_pass_is_counted_again(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    split = LeaveOneOut(LeaveOneOut.Config())
    counts = np.ones(ITEMS, np.int64)

    def kinds_of(rank, world, broken=False):
        kinds = TargetKinds(lambda: counts, timed=True)
        asked = requests(dataset, split, "test", max_length=3, batch=5, rank=rank, world=world, kinds=kinds)
        if broken:
            next(iter(asked))
            assert not kinds.complete
        for _ in range(2):
            list(asked)
        return kinds.counts

    whole = kinds_of(0, 1)
    assert whole[0] == (dataset.read_rows(0, USERS).lengths_R >= 2).sum()
    assert np.array_equal(sum(kinds_of(rank, 3) for rank in range(3)), whole)
    assert np.array_equal(kinds_of(0, 1, broken=True), whole)


def test_the_table_and_json_say_the_rule_and_the_kinds(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    result = run(configured(tmp_path, "train.max_steps=2"))
    rows = [r for r in result.metrics if r["kind"] == "eval" and r["split"] == "test"]
    wanted = by_hand(dataset, 1)
    assert {key: rows[0][key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
    for exclude, said in (
        ("none", "nothing left out"),
        ("kept", "the shown history left out"),
        ("all", "the whole history left out"),
    ):
        done = compare(str(result.path), "test", ["popularity"], [f"eval.exclude={exclude}"])
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(results_table(done.results, "title"))
        text = " ".join(console.export_text().split())
        assert f"whole catalogue ranked, {said} (eval.exclude={exclude})" in text
        assert f"targets: {wanted['cold_targets']:.2%} never a training action" in text
        assert f"{wanted['repeated_targets']:.2%} in the user's history already" in text
        assert f"{wanted['tied_targets']:.2%} at the time of the action before" in text
        for row in json.loads(to_json(done))["results"].values():
            assert row["exclude"] == exclude
            assert {key: row[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
