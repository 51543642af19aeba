"""Recommendations of a run against its own scores, and the files that ask for them and hold them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from gr import config as configs
from gr.data.requests import find_users, recommendation_requests
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.eval.evaluator import EvalResult
from gr.eval.tables import buckets_tables, results_table
from gr.train.evaluation import Evaluation
from gr.train.folder import RunFolder
from gr.train.parts import Catalogue, Data
from gr.train.recommend import recommend, write_item_vectors
from gr.train.runs import OpenRun
from gr.train.user_files import read_user_ids, unknown_users_file, write_unknown_users
from tests.precision import tolerance
from tests.unit.models_common import retrieval

ITEMS, K = 23, 20
# The same vectors, multiplied elsewhere: a norm and a product of 8 terms, times 1 / temperature = 20.
SCORES = tolerance(8, stages=2, size=20.0)


@pytest.fixture(params=["normalized", "biased"])
def run(request, tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 16, 13)
    rows = Sequences.of(
        np.arange(13) + 100,
        np.concatenate([[0], np.cumsum(lengths)]),
        item=rng.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        time=np.concatenate([np.sort(rng.integers(0, 10**6, n)) for n in lengths]),
    )
    writer = DatasetWriter(tmp_path / "data", "test", block_rows=5)
    writer.add(rows)
    catalogue = {"item_id": [f"i{n}" for n in range(ITEMS)], "count": np.zeros(ITEMS, np.int64)}
    dataset = writer.finish(pa.table(catalogue))
    biased = request.param == "biased"
    config = configs.from_dict(
        {
            "data": {"path": str(tmp_path / "data"), "max_length": 6},
            "model": {
                "dim": 8,
                "table_std": 1.0,
                "encoder": {"name": "hstu"},
                "similarity": {"item_bias": biased, "normalize": not biased, "temperature": 0.5},
            },
            "objective": "sampled_softmax",
            "optimizer": "adamw",
            "eval": {"batch": 4, "exclude": "kept"},
            "train": {"kernels": "reference"},
        }
    )
    model = retrieval(config, ITEMS, torch.zeros(ITEMS, dtype=torch.int64)).eval()
    if biased:
        torch.nn.init.normal_(model.items.bias, generator=torch.Generator().manual_seed(1))
    split = LeaveOneOut(config.data.split)
    data = Data(dataset, split, Catalogue(dataset, split))
    return OpenRun(RunFolder(tmp_path), config, data, model, step=1, epoch=1)


def expected_lists(run, exclude, k, time=None):
    """Raw user -> (raw items, scores), by sorting all scores."""
    lists = {}
    for asked in recommendation_requests(run.data.dataset, max_length=6, exclude=exclude, batch=3, time=time):
        scores_BI = run.model.scores(asked.batch)
        for i, user in enumerate(asked.users.tolist()):
            gone = asked.exclude_items[asked.exclude_offsets[i] : asked.exclude_offsets[i + 1]]
            row = scores_BI[i].index_fill(0, gone, -torch.inf)
            order = row.argsort(descending=True)[:k]
            order = order[row[order] > -torch.inf]
            lists[user] = ([f"i{n}" for n in order.tolist()], row[order].tolist())
    return lists


def read_lists(path):
    table = pq.read_table(path)
    assert table.column_names == ["user_id", "item_ids", "scores"]
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    return {row["user_id"]: (row["item_ids"], row["scores"]) for row in table.to_pylist()}


@pytest.mark.parametrize(("exclude", "time"), [("none", None), ("kept", 2 * 10**6), ("all", None)])
def test_lists_are_the_best_of_the_scores(run, tmp_path, exclude, time):
    done = []
    count = recommend(run, tmp_path / "r.parquet", k=K, exclude=exclude, time=time, advance=done.append)
    got, want = read_lists(tmp_path / "r.parquet"), expected_lists(run, exclude, K, time)
    assert count == sum(done) == len(got) == 13 and list(got) == list(want)
    for user, (items, scores) in got.items():
        assert items == want[user][0]
        np.testing.assert_allclose(scores, want[user][1], **SCORES)
    shortest = min(len(items) for items, _ in got.values())
    assert (shortest < K) == (exclude != "none"), (
        "excluded items are not written, even where too few are left"
    )


def test_inner_products_of_the_vectors_are_the_scores(run, tmp_path):
    recommend(run, tmp_path / "r.parquet", k=K, exclude="none", user_vectors=tmp_path / "u.parquet")
    write_item_vectors(run, tmp_path / "i.parquet")
    users, items = pq.read_table(tmp_path / "u.parquet"), pq.read_table(tmp_path / "i.parquet")
    assert items.column("item_id").to_pylist() == [f"i{n}" for n in range(ITEMS)]
    products = np.array(users.column("vector").to_pylist()) @ np.array(items.column("vector").to_pylist()).T
    for user, row in zip(users.column("user_id").to_pylist(), products, strict=True):
        names, scores = read_lists(tmp_path / "r.parquet")[user]
        np.testing.assert_allclose(row[[int(name[1:]) for name in names]], scores, **SCORES)


def all_gains(ranks, ks):
    """Each user's HR@k, NDCG@k and reciprocal rank."""
    gains = {f"hr@{k}": (ranks <= k).astype(float) for k in ks}
    gains |= {f"ndcg@{k}": np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0) for k in ks}
    return {**gains, "mrr": 1 / ranks}


def mean(gains):
    """As the evaluation adds gains up, whole numbers of 2**-32 each: the same to the last digit in any order."""
    return int(np.round(gains * 2.0**32).sum()) / 2.0**32 / len(gains)


@pytest.mark.parametrize("exclude", ["none", "kept", "all"])
def test_metrics_computed_from_the_lists_are_the_evaluations(run, tmp_path, exclude):
    """Without the held-out action, the lists rank what the evaluation ranks: same histories, same exclusion."""
    config = configs.override(run.config, [f"eval.exclude={exclude}", "eval.batch=5"])
    data = run.data
    evaluated = Evaluation(data.dataset, data.split, config, data.catalogue).run("test", run.model)
    out = tmp_path / "r.parquet"
    count = recommend(run, out, k=ITEMS, exclude=exclude, held_out="test")
    rows = pq.read_table(out).to_pylist()
    histories = {}
    for number in range(len(run.data.dataset.manifest.blocks)):
        block = run.data.dataset.read_block(number)
        items = np.split(block.items_A, block.offsets_R1[1:-1])
        histories |= dict(zip(block.users_R.tolist(), items, strict=True))
    assert {r["user_id"]: r["target_id"] for r in rows} == {
        user: f"i{items[-1]}" for user, items in histories.items() if len(items) > 1
    }
    assert count == len(rows) == evaluated.users < 13, "some users have one action alone"
    ranks = np.array([1.0 + row["item_ids"].index(row["target_id"]) for row in rows])
    assert {name: mean(gains) for name, gains in all_gains(ranks, config.eval.ks).items()} == {
        name: value for name, value in evaluated.metrics.items() if name != "loss"
    }  # which lists don't tell
    if exclude != "none":
        assert min(len(row["item_ids"]) for row in rows) < ITEMS


def test_held_out_actions_of_some_users(run, tmp_path):
    asked = [101, 103, 5, 107, "nobody"]
    found = find_users(run.data.dataset, asked)
    assert found.unknown == [5, "nobody"] and found.users == 3
    recommend(run, tmp_path / "some.parquet", k=K, users=found, held_out="test")
    recommend(run, tmp_path / "all.parquet", k=K, held_out="test")
    every = {row["user_id"]: row for row in pq.read_table(tmp_path / "all.parquet").to_pylist()}
    some = {row["user_id"]: row for row in pq.read_table(tmp_path / "some.parquet").to_pylist()}
    assert some.keys() == {101, 103, 107} & every.keys() and some
    for user, row in some.items():
        assert row["item_ids"] == every[user]["item_ids"] and row["target_id"] == every[user]["target_id"]
    with pytest.raises(UserError, match="'tset'"):
        recommend(run, tmp_path / "r.parquet", held_out="tset")
    with pytest.raises(UserError, match="leave --time out"):
        recommend(run, tmp_path / "r.parquet", held_out="test", time=7)
    alone = [user for user in range(100, 113) if user not in every]
    with pytest.raises(UserError, match="none of these users has an action that split 'test' holds out"):
        recommend(run, tmp_path / "r.parquet", held_out="test", users=alone)
    assert not (tmp_path / "r.parquet").exists()


def test_unknown_users_are_listed_beside_the_known_ones(run, tmp_path):
    out = tmp_path / "r.parquet"
    found = find_users(run.data.dataset, ["nobody", 104, "104", 5, "nobody", "5"])
    assert found.unknown == ["nobody", 5] and found.users == 1
    assert recommend(run, out, users=found) == 1
    assert list(read_lists(out)) == [104]
    listed = tmp_path / "r.unknown-users.txt"
    assert write_unknown_users(found, out) == str(listed) == unknown_users_file(out)
    assert read_user_ids(listed) == ["nobody", "5"]
    assert write_unknown_users(find_users(run.data.dataset, [104]), out) is None and not listed.exists()
    with pytest.raises(UserError, match=r"2 of 3 users are not in the dataset .*, the first is 'nobody'"):
        found.refuse_unknown()


def test_nothing_half_written_is_left(run, tmp_path):
    with pytest.raises(UserError, match="1 of 2 users are not in the dataset"):
        recommend(run, tmp_path / "r.parquet", users=["100", "5"])
    with pytest.raises(UserError, match="the list of users is empty"):
        recommend(run, tmp_path / "r.parquet", users=[])
    with pytest.raises(UserError, match="there is no folder"):
        recommend(run, tmp_path / "none" / "r.parquet")
    run.model.items.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="scores items as NaN"):
        recommend(run, tmp_path / "r.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_user_ids_from_files(tmp_path):
    for mark in ("", "\ufeff"):
        (tmp_path / "ids.txt").write_text(f"{mark}7\n\n ann \n7\n")
        assert read_user_ids(tmp_path / "ids.txt") == ["7", "ann", "7"]
    table = pa.table({"user_id": [3, 1], "other": ["x", "y"]})
    pq.write_table(table, tmp_path / "ids.parquet")
    assert read_user_ids(tmp_path / "ids.parquet") == ["3", "1"]
    (tmp_path / "ids.csv").write_text("user_id,n\n007,1\n7,2\n")
    assert read_user_ids(tmp_path / "ids.csv") == ["007", "7"]
    (tmp_path / "ids.csv").write_text("user_id,n\n7,1\n,2\n")
    with pytest.raises(UserError, match=r"row 2 of .* has no user_id"):
        read_user_ids(tmp_path / "ids.csv")
    (tmp_path / "ids.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="is not text: list the ids one a line"):
        read_user_ids(tmp_path / "ids.txt")
    pq.write_table(table.drop(["user_id"]), tmp_path / "wrong.parquet")
    with pytest.raises(UserError, match=r"has no column user_id \(it has other\)"):
        read_user_ids(tmp_path / "wrong.parquet")
    pq.write_table(pa.table({"user_id": [3, None]}), tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"row 2 of .* has no user_id"):
        read_user_ids(tmp_path / "null.parquet")
    pq.write_table(pa.table({"user_id": [3.0, 12345678901.0]}), tmp_path / "floats.parquet")
    assert read_user_ids(tmp_path / "floats.parquet") == ["3", "12345678901"]
    pq.write_table(pa.table({"user_id": [b"ann"]}), tmp_path / "bytes.parquet")
    assert read_user_ids(tmp_path / "bytes.parquet") == ["ann"]
    pq.write_table(pa.table({"user_id": [["a"]]}), tmp_path / "lists.parquet")
    with pytest.raises(UserError, match=r"user_id of .* is of type list"):
        read_user_ids(tmp_path / "lists.parquet")
    with pytest.raises(UserError, match="no file"):
        read_user_ids(tmp_path / "missing.txt")


def test_tables_fit_a_terminal_and_hold_the_figures():
    metrics = {f"{kind}@{k}": 0.1234 for kind in ("hr", "ndcg") for k in (1, 5, 10, 50, 200, 500)}
    metrics |= {"mrr": 0.0567, "loss": 12.3456}
    bucket = {"from": 1000, "to": None, "users": 12, **metrics}
    result = EvalResult(
        "test",
        12,
        metrics,
        {"history": [{**bucket, "from": 1, "to": 4}, bucket]},
        population=99,
        heading="whole catalogue ranked",
        shown=["hr@10", "ndcg@10", "hr@50", "hr@200", "mrr", "loss"],
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table({"popularity": result, "last_item": result}, "title"))
    for table in buckets_tables(result, "hstu"):
        console.print(table)
    text = console.export_text()
    assert (
        "…" not in text
        and "12 users of 99, whole catalogue ranked" in text
        and "1,000 and more" in text
        and "1 to 4" in text
    )
    assert text.count("0.1234") == 2 * 12 + 2 * 4 and text.count("0.0567") == text.count("12.3456") == 4
