"""Scores of given candidates: those of the evaluation, whatever is asked together, and what is said of bad requests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr import config as configs
from gr.batch import TARGETS_FROM
from gr.errors import UserError
from gr.models.step import StepContext
from gr.modes import evaluating
from gr.train import job, rank as library
from gr.train.rank import rank
from gr.train.runs import open_run
from tests.precision import tolerance
from tests.unit.test_ranking_run import CONFIG, make_dataset

INTERLEAVED = ["model.actions=interleaved", "model.interaction=product"]
PAST = "{name: %s, dim: 16, tasks: {like: {column: value, at_least: 4}}%s}"
MODELS = {
    "interleaved": INTERLEAVED,
    "together": ["model.actions=together", "model.interaction=product"],
    "summed": [],
    "sasrec": ["model.encoder={name: sasrec, layers: 1, heads: 2, ffn: 16, dropout: 0.2}"],
    "din": ["model=" + PAST % ("din", ", attention: [8], hidden: [8]")],
    "dlrm": ["model=" + PAST % ("dlrm", ", hidden: [8]")],
}
PAGES = 5
FEATURES = (
    f"{{page: {{column: page, of_request: true, rows: {PAGES}}}, "
    "share: {column: share, of_request: true, number: plain}}"
)
KNOWING = {"knowing": [*INTERLEAVED, f"model.input={{features: {FEATURES}}}"]}
"""A run that knows more of a request than its time."""
# probabilities: a slope of 1/4 at most, of logits that are sums of up to 50 terms in some layers
OFF = tolerance(50, stages=20, size=10.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    numbers = np.arange(make_dataset(folder / "count").manifest.actions)  # no two actions at once
    asked = {"page": numbers % PAGES, "share": (numbers % 7 / 7).astype(np.float32)}
    make_dataset(folder / "data", time=numbers * 3600, **asked)
    found = {}
    for name, overrides in (MODELS | KNOWING).items():
        file = folder / f"{name}.yaml"
        file.write_text(CONFIG.format(run=folder / name, data=folder / "data"))
        short = ["train.max_steps=2", "eval.splits=[test]", "eval.baselines=[]"]
        job.run(configs.load(file, [*short, *overrides]))
        found[name] = open_run(folder / name)
    return found


def write(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def requests(run):
    """Of the test split, as the evaluation asks."""
    from gr.train.evaluation import Evaluation

    evaluation = Evaluation(
        run.data.dataset,
        run.data.split,
        run.config,
        run.data.catalogue,
        judged_by="pointwise",
        columns=run.model.needs | {"time"},
    )
    return evaluation.requests("test")


def held_out(run):
    """(users, items, times, probabilities) of the test split as the evaluation asks."""
    parts = []
    for request in requests(run):
        last = request.batch.offsets_B1[1:] - 1
        times = request.batch.timestamps_T[last]
        parts.append(
            (
                request.users,
                request.targets_B.numpy(),
                times.numpy(),
                run.model.logits(request.batch).sigmoid(),
            )
        )
    return [np.concatenate(column) for column in zip(*parts)]


def scores(file, names):
    table = pq.read_table(file)
    return [[np.array(row) for row in table[name].to_pylist()] for name in names]


@pytest.mark.parametrize("name", MODELS)
def test_rank_gives_what_the_evaluation_gives_and_the_order_of_requests_is_theirs(runs, tmp_path, name):
    run = runs[name]
    users, items, times, wanted = held_out(run)
    mixed = np.random.default_rng(0).permutation(len(users))
    others = [[int(item), (int(item) + 1) % 30, 3] for item in items[mixed]]
    asked = write(tmp_path / "asked.parquet", user_id=users[mixed], item_ids=others, time=times[mixed])
    done = rank(run, asked, tmp_path / "out.parquet", at_once=2)
    assert (done.requests, done.candidates, done.without_history) == (len(users), 3 * len(users), 0)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["user_id"].to_pylist() == users[mixed].tolist() and table["item_ids"].to_pylist() == others
    for task, found in enumerate(scores(tmp_path / "out.parquet", run.model.labels.names)):
        first = torch.tensor([row[0] for row in found])
        torch.testing.assert_close(first, torch.tensor(wanted[mixed, task]), **OFF, check_dtype=False)


@pytest.mark.parametrize("name", MODELS)
def test_training_asks_what_the_evaluation_asks(runs, name):
    """The logits whose loss is trained, without dropout, of the same actions: to the bit."""
    model, (request, *_) = runs[name].model, requests(runs[name])
    for sequence in range(20):
        alone = request.batch.slice(sequence, sequence + 1)
        if alone.lengths[0] < 2:
            continue
        last = dataclasses.replace(alone, user_columns={TARGETS_FROM: torch.tensor([alone.lengths[0] - 1])})
        part, context = model.supervise(last, 5), StepContext(5)
        with torch.no_grad(), evaluating(model):
            found = model._logits(part, dataclasses.replace(context, views=model.views([part], context)))
        assert torch.equal(found, model.logits(alone)), sequence


@pytest.mark.parametrize("name", ["interleaved", "din"])
def test_how_much_is_computed_at_a_time_changes_nothing_but_rounding(runs, tmp_path, monkeypatch, name):
    run = runs[name]
    users = run.data.dataset.read_user_ids(0)[:6].tolist()
    lists = [[i % 30 for i in range(n)] for n in (40, 0, 3, 9, 1, 5)]
    asked = write(tmp_path / "asked.parquet", user_id=users, item_ids=pa.array(lists, pa.list_(pa.int64())))
    rank(run, asked, tmp_path / "whole.parquet")
    monkeypatch.setattr(library, "CANDIDATES", 7)
    monkeypatch.setattr(library, "ACTIONS", 40)
    monkeypatch.setattr(library, "REQUESTS", 4)
    done = rank(run, asked, tmp_path / "cut.parquet", at_once=3)
    assert done.candidates == 58
    for whole, cut in zip(*(scores(tmp_path / f"{n}.parquet", ["like"])[0] for n in ("whole", "cut"))):
        assert len(whole) == len(cut)
        np.testing.assert_allclose(cut, whole, **OFF)


def test_long_lists_are_read_alone_and_progress_counts_candidates(runs, tmp_path, monkeypatch):
    """Lists of one user, of any length and none, in row groups of three: pieces of LISTED candidates, or one list."""
    run, lengths = runs["interleaved"], [2, 0, 5, 1, 23, 0, 3, 3, 3, 0, 9, 1]
    lists = pa.array([[i % 30 for i in range(n)] if n else None for n in lengths], pa.list_(pa.int64()))
    user = run.data.dataset.read_user_ids(0)[0].item()
    asked = tmp_path / "asked.parquet"
    pq.write_table(pa.table({"user_id": [user] * len(lengths), "item_ids": lists}), asked, row_group_size=3)
    pieces, scored, advanced = [], library._scored, []
    monkeypatch.setattr(library, "LISTED", 8)
    monkeypatch.setattr(library, "REQUESTS", 4)
    monkeypatch.setattr(library, "CANDIDATES", 7)

    def watched(run, model, table, *others):
        pieces.append([len(row or []) for row in table["item_ids"].to_pylist()])
        return scored(run, model, table, *others)

    monkeypatch.setattr(library, "_scored", watched)
    rank(run, asked, tmp_path / "out.parquet", advance=advanced.append)
    assert [length for piece in pieces for length in piece] == lengths
    assert all(len(piece) <= 4 and (sum(piece) <= 8 or len(piece) == 1) for piece in pieces)
    assert sum(advanced) == sum(lengths) and max(advanced) <= 8
    assert library.check_requests(run, asked) == sum(lengths) + lengths.count(0)
    found = pq.read_table(tmp_path / "out.parquet")["like"].to_pylist()
    assert [len(row) for row in found] == lengths
    # an item's score doesn't hang on where it stands
    for row in found:
        np.testing.assert_allclose(row, found[4][: len(row)], **OFF)


def test_what_the_dataset_does_not_have_is_refused_or_null_and_counted(runs, tmp_path):
    run = runs["interleaved"]
    user = run.data.dataset.read_user_ids(0)[0]
    asked = write(tmp_path / "asked.parquet", user_id=[user, 10**6], item_ids=[[3, 999], [4]])
    with pytest.raises(
        UserError,
        match=r"1 of 2 users are not in the dataset.*the first is 1000000: take their .*--unknown null",
    ):
        rank(run, asked, tmp_path / "out.parquet")
    done = rank(run, asked, tmp_path / "out.parquet", unknown="null")
    assert (done.unknown_users, done.unknown_items) == (1, 1)
    ((first, second), (third,)) = pq.read_table(tmp_path / "out.parquet")["like"].to_pylist()
    assert 0 < first < 1 and second is None and third is None
    write(asked, user_id=[user], item_ids=[[3, 999]])
    with pytest.raises(
        UserError, match=r"1 candidates of .* are not in the catalogue of .*first is 999.*--unknown null"
    ):
        rank(run, asked, tmp_path / "no.parquet")
    assert not (tmp_path / "no.parquet").exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_request_before_all_that_its_user_did_is_answered_and_counted(runs, tmp_path, name):
    run = runs[name]
    user = run.data.dataset.read_user_ids(0)[0]
    asked = write(tmp_path / "asked.parquet", user_id=[user], item_ids=[[1, 2]], time=[-1])
    assert rank(run, asked, tmp_path / "out.parquet").without_history == 1
    (found,) = pq.read_table(tmp_path / "out.parquet")["like"].to_pylist()
    assert all(0 < p < 1 for p in found)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"item_ids": [[1]]}, r"has no column 'user_id' \(it has item_ids\), and a request needs it"),
        ({"user_id": [1], "item_ids": [1]}, "column item_ids of .* is of type int64: give a list"),
        (
            {"user_id": [1], "item_ids": [["x"]]},
            "item_ids of .* are of type string, and the dataset's items are int64",
        ),
        # which a cast would take for item 1
        ({"user_id": [1], "item_ids": [["001"]]}, "item_ids of .* are of type string"),
        ({"user_id": [1], "item_ids": [["0x1"]]}, "item_ids of .* are of type string"),
        ({"user_id": [1], "item_ids": [[True]]}, "item_ids of .* are of type bool"),
        (
            {"user_id": [1], "item_ids": pa.array([[1]], pa.list_(pa.timestamp("s")))},
            "item_ids of .* are of type timestamp",
        ),
        ({"user_id": [1], "item_ids": [[1]], "time": ["now"]}, "column time of .* holds no integers"),
        ({"user_id": [1], "item_ids": [[1]], "time": pa.array([None], pa.int64())}, "a request without time"),
        (
            {"user_id": [1], "item_ids": [[1]], "time": [1_700_000_000_000]},
            "time 1700000000000 of a request of .* is not between the years 1740 and 2200: give it in seconds",
        ),
        (
            {"user_id": [1], "item_ids": [[1]], "time": pa.array([2**63 + 5], pa.uint64())},
            "time 9223372036854775813 of a request .* give it in seconds",
        ),
        (
            {"user_id": [1.5], "item_ids": [[1]]},
            "column 'user_id' of .* is of type double .*1.5.*holds int64",
        ),
        ({"user_id": pa.array([None], pa.int64()), "item_ids": [[1]]}, "a request without user_id"),
        (
            {"user_id": [[1]], "item_ids": [[1]]},
            "column user_id of .* is of type list<.*: give the log's ids",
        ),
        ({"user_id": [True], "item_ids": [[1]]}, "column user_id of .* is of type bool"),
        (
            {"user_id": pa.array([1], pa.date32()), "item_ids": [[1]]},
            "column user_id of .* is of type date32",
        ),
        (
            {"user_id": pa.array([], pa.int64()), "item_ids": pa.array([], pa.list_(pa.int64()))},
            "has no request",
        ),
    ],
)
def test_bad_requests_are_said_in_a_sentence(runs, tmp_path, columns, sentence):
    asked = write(tmp_path / "asked.parquet", **columns)
    with pytest.raises(UserError, match=sentence):
        rank(runs["summed"], asked, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"page": None}, "has no column 'page' .*the run's model knows 'page' of a request: add it"),
        ({"page": [1.7]}, "column 'page' of .* is of type double .*1.7.* and the dataset's holds int64"),
        ({"page": [float("nan")]}, "column 'page' of .* is of type double"),
        (
            {"page": pa.array([2**64 - 1], pa.uint64())},
            "column 'page' of .* is of type uint64 .*not in range",
        ),
        ({"page": pa.array([1], pa.date32())}, "column 'page' of .* is of type date32"),
        ({"page": [[1]]}, "column 'page' of .* is of type list<"),
        ({"page": [True]}, "column 'page' of .* is of type bool .neither a number nor text"),
        (
            {"page": ["0x1"]},
            "column 'page' of .* is of type string .text that isn't an integer as it is written",
        ),
        (
            {"page": ["01"]},
            "column 'page' of .* is of type string .text that isn't an integer as it is written",
        ),
        ({"page": pa.array([1], pa.timestamp("s"))}, "column 'page' of .* is of type timestamp"),
        ({"page": [PAGES]}, f"column 'page' holds {PAGES}, and its table has rows for 0 to {PAGES - 1}"),
        ({"share": pa.nulls(1)}, "a request without 'share': fill it in"),
        ({"share": [1e300]}, "column 'share' holds inf"),
        ({"share": ["much"]}, "column 'share' of .* is of type string"),
    ],
)
def test_what_a_request_knows_is_read_as_it_stands_or_refused(runs, tmp_path, columns, sentence):
    given = {"user_id": [1], "item_ids": [[1]], "page": [1], "share": [0.5], **columns}
    asked = write(tmp_path / "asked.parquet", **{n: c for n, c in given.items() if c is not None})
    with pytest.raises(UserError, match=sentence):
        rank(runs["knowing"], asked, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_a_column_that_stands_twice_is_refused(runs, tmp_path):
    columns = [pa.array([1]), pa.array([1]), pa.array([[1]])]
    pq.write_table(
        pa.Table.from_arrays(columns, names=["user_id", "user_id", "item_ids"]), tmp_path / "asked.parquet"
    )
    with pytest.raises(UserError, match="has two columns 'user_id'"):
        rank(runs["summed"], tmp_path / "asked.parquet", tmp_path / "out.parquet")


def test_a_model_that_tells_requests_apart_by_time_must_be_told_it(runs, tmp_path):
    asked = write(tmp_path / "asked.parquet", user_id=[1], item_ids=[[1]])
    with pytest.raises(UserError, match=r"has no column 'time' .*knows 'time' of a request: add it"):
        rank(runs["together"], asked, tmp_path / "out.parquet")


def test_what_was_done_in_the_second_of_a_request_is_not_known(runs, tmp_path):
    run = runs["interleaved"]
    user = run.data.dataset.read_user_ids(0)[0].item()
    times = run.data.dataset.read_rows(0, 1).timestamps_A
    asked = write(
        tmp_path / "asked.parquet", user_id=[user] * 2, item_ids=[[1]] * 2, time=[times[0], times[0] + 1]
    )
    assert rank(run, asked, tmp_path / "out.parquet").without_history == 1


def test_numbers_of_another_type_with_the_same_values_give_the_same_scores(runs, tmp_path):
    plain = {"user_id": [1, 2], "item_ids": [[1, 1], [3, 4]], "page": [1, 2], "share": [0.0, 1.0]}
    other = {
        "user_id": pa.array([1.0, 2.0]),
        "item_ids": pa.array([[1, 1], [3, 4]], pa.list_(pa.uint16(), 2)),
        "page": pa.array([1.0, 2.0], pa.float32()),
        "share": pa.array([0, 1], pa.int8()),
    }
    found = []
    for columns in (plain, other):
        rank(runs["knowing"], write(tmp_path / "asked.parquet", **columns), tmp_path / "out.parquet")
        found.append(pq.read_table(tmp_path / "out.parquet")["like"].to_pylist())
    assert found[0] == found[1] and found[0][0][0] == found[0][0][1]
