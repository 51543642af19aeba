"""AUC, NE and log loss against counting every pair, and the sums behind them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gr.batch import SequenceBatch
from gr.config import EvalSection
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.eval.baselines import Prior
from gr.eval.evaluator import evaluate
from gr.eval.pairs import by_user, ordered
from gr.eval.pointwise import LARGEST_LOSS, PointwiseMetrics
from gr.eval.tables import buckets_tables, results_table
from gr.labels import Labels, LabelTask
from gr.processes import Axis
from tests.precision import UNIT, growth

COLUMNS = [ColumnInfo("item", "int32"), ColumnInfo("value", "float32")]
LABELS = Labels(
    {"like": LabelTask(column="value", at_least=4), "love": LabelTask(column="value", at_least=5)},
    SimpleNamespace(columns=COLUMNS, action_type_names=[]),
)


@dataclass
class Asked:
    """Users with a history of one action, which must not count, and the action that is judged."""

    batch: SequenceBatch
    history_lengths_B: torch.Tensor
    users: np.ndarray

    def __len__(self):
        return self.batch.sequences

    def to(self, device):
        return self


def asked(values, lengths, ordinals=None):
    count = len(values)
    both = torch.stack([torch.full((count,), 5.0), torch.as_tensor(values, dtype=torch.float32)], dim=1)
    ordinals = torch.arange(count) if ordinals is None else ordinals
    columns = {"item": torch.zeros(2 * count, dtype=torch.int64), "value": both.flatten()}
    batch = SequenceBatch(torch.arange(count + 1) * 2, ordinals, (2,) * count, columns)
    return Asked(batch, torch.as_tensor(lengths), ordinals.numpy() + 1000)


class Fixed:
    """Logits by ordinal."""

    def __init__(self, logits):
        self.table = torch.as_tensor(logits, dtype=torch.float32)

    def logits(self, batch):
        return self.table[batch.ordinals_B]


def measured(logits, values, lengths, order=None, size=None, buckets=True):
    family = PointwiseMetrics(EvalSection(buckets=buckets), LABELS)
    order = torch.arange(len(values)) if order is None else order
    for part in order.split(size or len(values)):
        family.add(Fixed(logits), asked(np.asarray(values)[part], np.asarray(lengths)[part], part))
    return family


def rounding(logits):
    """Of a mean of losses in float64: each is a difference of numbers as large as its logit."""
    return (4 + float(growth(len(logits)))) * UNIT[torch.float64] * float(np.abs(logits).max())


# Of an area in float64: two quotients of whole numbers, a half and their sum, none above 1.
AREA = 4 * UNIT[torch.float64]


def brute_auc(logits, labels):
    positives, negatives = logits[labels == 1], logits[labels == 0]
    above = (positives[:, None] > negatives[None]).mean()
    return above + (positives[:, None] == negatives[None]).mean() / 2


def brute_loss(logits, labels):
    logits = logits.astype(np.float64)
    return np.mean(np.logaddexp(0, logits) - labels * logits)


def brute_entropy(labels):
    rate = labels.mean()
    return -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)


def case(seed, users=400, scale=2.0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 6, users).astype(np.float32)
    logits = (rng.normal(0, scale, (users, 2)) + 0.4 * values[:, None] - 1.5).astype(np.float32)
    logits[rng.random(users) < 0.2] = 0.5  # exact ties
    values[rng.random(users) < 0.1] = np.nan
    return logits, values, rng.integers(1, 60, users)


@pytest.mark.parametrize("seed,scale", [(0, 2.0), (1, 0.01), (2, 30.0)])
def test_metrics_agree_with_counting_every_pair(seed, scale):
    logits, values, lengths = case(seed, scale=scale)
    result = measured(logits, values, lengths).result()
    known = ~np.isnan(values)
    for task, (name, least) in enumerate((("like", 4), ("love", 5))):
        labels, own = (values[known] >= least).astype(float), logits[known, task]
        assert abs(result[f"auc/{name}"] - brute_auc(own, labels)) <= AREA
        loss, entropy, off = brute_loss(own, labels), brute_entropy(labels), 2.0**-25 + rounding(own)
        assert result[f"log_loss/{name}"] == pytest.approx(loss, abs=off)
        # an entropy's terms are of one sign: a few roundings of itself
        off = off / entropy + 10 * UNIT[torch.float64] * loss / entropy
        assert result[f"ne/{name}"] == pytest.approx(loss / entropy, abs=off)
        assert result[f"base_rate/{name}"] == labels.mean() and result[f"labels/{name}"] == known.sum()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_auc_is_that_of_scikit_learn(scale):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(5)
    values = rng.integers(3, 6, 3000).astype(np.float32)
    logits = (rng.normal(0, scale, (3000, 2)) + scale * values[:, None]).astype(np.float32)
    logits[rng.random(3000) < 0.3] = np.float32(scale)
    result = measured(logits, values, np.ones(3000, int)).result()
    for task, (name, least) in enumerate((("like", 4), ("love", 5))):
        assert abs(result[f"auc/{name}"] - roc_auc_score(values >= least, logits[:, task])) < 1e-12


def test_places_of_numbers_are_in_their_order():
    x = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, torch.inf])
    places = ordered(x).tolist()
    assert places == sorted(places) and places[4] == places[5] and len(set(places)) == 9
    assert min(places) >= 0 and max(places) < 2**32


def test_gauc_is_the_mean_of_the_users_own_areas_and_counts_the_others():
    rng = np.random.default_rng(7)
    users, labels = rng.integers(0, 60, 500), rng.random(500) < 0.3
    logits = (rng.integers(-8, 8, 500) / 4).astype(np.float32)  # many ties
    areas, sizes = [], []
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            areas.append(brute_auc(logits[own], labels[own]))
            sizes.append(own.sum())
    found = by_user(torch.tensor(users), ordered(torch.tensor(logits)), torch.tensor(labels), Axis())
    assert abs(found.area - np.mean(areas)) < 1e-12
    assert abs(found.weighted - np.average(areas, weights=sizes)) < 1e-12
    assert found.users == len(areas) > 40 and found.users + found.one_class == len(np.unique(users))
    nobody = torch.empty(0, dtype=torch.int64)
    assert by_user(nobody, nobody, nobody.bool(), Axis()).weighted is None


def test_calibration_is_what_is_expected_over_what_came():
    logits, values, lengths = case(8)
    result, known = measured(logits, values, lengths).result(), ~np.isnan(values)
    expected = 1 / (1 + np.exp(-logits[known, 0].astype(np.float64)))
    want = expected.sum() / (values[known] >= 4).sum()
    assert result["calibration/like"] == pytest.approx(want, rel=2.0**-30)


def test_sums_depend_on_no_order():
    logits, values, lengths = case(3, users=997)
    whole = measured(logits, values, lengths)
    for order, size in ((torch.arange(997).flip(0), 7), (torch.randperm(997), 640)):
        other = measured(logits, values, lengths, order, size)
        assert other.result() == whole.result() and other.by_bucket() == whole.by_bucket()


def test_buckets_are_the_metrics_of_their_users():
    logits, values, lengths = case(4)
    buckets = measured(logits, values, lengths).by_bucket()["history"]
    assert [b["from"] for b in buckets] == [1, 5, 10, 20, 50]
    for bucket in buckets:
        inside = (lengths >= bucket["from"]) & (lengths <= (bucket["to"] or 10**9))
        alone = measured(logits[inside], values[inside], lengths[inside]).result()
        assert {k: v for k, v in bucket.items() if "/" in k} == alone and bucket["users"] == inside.sum()
    assert measured(logits, values, lengths, buckets=False).by_bucket() == {}
    (nobody,) = measured(logits, values, np.zeros_like(lengths)).by_bucket()["history"]
    assert (nobody["from"], nobody["to"], nobody["users"]) == (0, 0, len(values)), "requests without history"


def test_buckets_have_the_users_own_areas_of_their_known_labels():
    rng = np.random.default_rng(5)
    logits, labels = rng.normal(size=(300, 2)), rng.integers(0, 2, 300)
    values, lengths = np.where(labels, 5.0, 1.0), rng.choice([1, 7, 60], 300)
    known = rng.random(300) > 0.2
    values[~known] = np.nan
    owners = torch.tensor(rng.integers(0, 40, 300))
    metrics = measured(logits, values, lengths)
    metrics._owners = [owners]  # an action each so far
    for bucket in metrics.by_bucket()["history"]:
        own = known & (lengths >= bucket["from"]) & (lengths <= (bucket["to"] or 10**9))
        areas = by_user(
            owners[own], ordered(torch.tensor(logits[own, 0])), torch.tensor(labels[own] == 1), Axis()
        )
        assert (bucket["gauc/like"], bucket["gauc_mean/like"]) == (areas.weighted, areas.area)
        assert (bucket["gauc_users/like"], bucket["one_class_users/like"]) == (areas.users, areas.one_class)
        assert {
            "auc/like",
            "ne/like",
            "base_rate/like",
            "calibration/like",
        } <= bucket.keys() and areas.users > 9


@pytest.mark.parametrize(
    ("values", "missing", "note"),
    [
        ([4, 4, 4], ["auc/like", "ne/like"], "no auc/like and no ne/like: all 3 labels are 1"),
        ([4, 4, 4], ["auc/love", "ne/love"], "no auc/love and no ne/love: all 3 labels are 0"),
        (
            [np.nan] * 2,
            ["auc/like", "ne/like", "log_loss/like"],
            "no metrics of like: no user's label is known",
        ),
    ],
)
def test_without_both_labels_there_is_no_auc_but_a_sentence(values, missing, note):
    family = measured(np.zeros((len(values), 2)), values, [1] * len(values))
    result = family.result()
    assert not set(missing) & result.keys() and note in family.notes()
    assert family.users == len(values) and result["labels/like"] == np.isfinite(values).sum()
    for table in (results_table({"x": evaluate(Fixed([[0, 0]]), [], family)}, "title"),):
        assert note in table.caption
    assert measured(np.zeros((2, 2)), [1, 5], [1, 1]).notes() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_one_sentence(bad):
    logits = np.zeros((6, 2), np.float32)
    logits[4, 1] = bad
    with pytest.raises(
        UserError, match=r"Fixed gave logits that are no finite numbers for 1 users, the first is 1004"
    ):
        measured(logits, [1, 2, 3, 4, 5, 1], [1] * 6, size=3)
    with pytest.raises(ValueError, match=r"gave \(6, 1\), not \(6, 2\)"):
        measured(np.zeros((6, 1)), [1, 2, 3, 4, 5, 1], [1] * 6)


def test_enormous_logits_overflow_nothing():
    logits = np.array([[3e38, 0], [-3e38, 0], [1e6, 0]])
    result = measured(logits, [5, 1, 1], [1, 1, 1]).result()
    assert result["auc/like"] == 1.0
    assert result["log_loss/like"] == LARGEST_LOSS / 3


def test_the_prior_is_the_base_rate_of_the_training_actions():
    values = np.array([5, 4, 3, np.nan, 1, 4], np.float32)
    training = [
        SimpleNamespace(columns={"value": values[:2], "item": np.zeros(2, np.int32)}),
        SimpleNamespace(columns={"value": values[2:], "item": np.zeros(4, np.int32)}),
    ]
    prior = Prior(LABELS).fit(training, 9)
    logits = prior.logits(asked([1, 2], [1, 1]).batch)
    wanted = torch.tensor([[3.5 / 2.5, 1.5 / 4.5]], dtype=torch.float64).log().float()  # rounded once
    assert torch.equal(logits, wanted.expand(2, -1))
    assert prior.needs == {"value"} and prior.judged_by == "pointwise"
    untold = Prior(LABELS).fit([], 9).logits(asked([1], [1]).batch)
    assert untold.tolist() == [[0, 0]]


def test_tables_have_a_row_a_task_and_fit_a_terminal():
    import io

    from rich.console import Console

    logits, values, lengths = case(6)
    family = measured(logits, values, lengths)
    result = evaluate(Fixed(logits), [], family)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table({"prior": result, "hstu": result}, "title"))
    for table in buckets_tables(result, "hstu"):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and "log_loss" in text and "love" in text and "400 users, labels of" in text
    assert text.count(f"{result.metrics['auc/love']:.4f}") == 2 and "by actions in the user's history" in text
