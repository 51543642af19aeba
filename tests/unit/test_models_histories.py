"""DIN and DLRM: what a candidate knows, their gradients, and what a batch's companions are to them."""

from __future__ import annotations

import pytest
import torch

from gr.models.din import Dice
from tests.precision import tolerance
from tests.unit.models_common import assert_slopes
from tests.unit.test_models_interleaved import (
    CATALOGUE,
    FEATURES,
    GENRES,
    build as build_ranking,
    candidates,
    known_too_early,
    logits_of,
    other,
    shown,
)
from tests.unit.test_models_ranking import LOSS, TASKS, loss_of

MODELS = {
    "din": {"name": "din", "attention": [6], "hidden": [7, 5]},
    "din prelu l2": {"name": "din", "attention": [6], "hidden": [7], "activation": "prelu", "l2": 0.5},
    "dlrm": {"name": "dlrm", "bottom": [5], "hidden": [7]},
}


def build(name, **changes):
    model = {**MODELS[name], "dim": 8, "tasks": TASKS, "input": {"features": FEATURES}, **changes}
    CATALOGUE.training_counts = torch.arange(CATALOGUE.rows)
    return build_ranking(whole=model)


@pytest.mark.parametrize("name", MODELS)
def test_no_prediction_knows_its_own_label_or_a_later_one(name):
    assert known_too_early(build(name), shown()) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_earlier_action_and_what_is_known_of_the_moment_counts(name):
    model, b = build(name), shown((5,))
    before = logits_of(model, b)
    for place in range(5):
        for column in ("item", "page", "value"):
            moved = (logits_of(model, other(b, column, place)) != before).any(1).tolist()
            own = column != "value"
            want = [
                judged == place if column == "page" else judged >= place + (not own) for judged in range(1, 5)
            ]
            assert moved == want, (column, place)


def double(model):
    for table in model.tables.values():
        table.double()
    return model.double()


def known_of(model, b):
    """What a model's formula is made of, float64: by name the vectors of each action's item, of all else that is known
    of it, and of its user; (A, K) labels, a third of one task's unknown."""
    users = torch.repeat_interleave(torch.arange(b.sequences), b.offsets_B1.diff())
    rows = {
        "items": b.items_T,
        "genre": GENRES[b.items_T],
        "page": b.columns["page"],
        "watched": b.columns["watched"],
        "degree": b.user_columns["degree"][users],
    }
    return {name: model.tables[name].weight[row] for name, row in rows.items()}, model.labels.of(b.columns)


def partly_labelled():
    b = shown((5, 1, 0, 6))
    values = b.columns["value"].clone()
    values[::3] = torch.nan
    return b.with_columns(value=values)


def pasts(b):
    """(place, places before it) of all that are judged."""
    starts = b.offsets_B1[:-1].tolist()
    return [(s + i, torch.arange(s, s + i)) for s, n in zip(starts, b.lengths) for i in range(1, n)]


@pytest.mark.parametrize("name", ["din", "din prelu l2"])
def test_din_is_its_formula(name):
    model, b = double(build(name)), partly_labelled()
    v, labels = known_of(model, b)
    item, wanted = v["items"] + v["genre"], []
    signs = torch.cat([labels == 1, labels == 0], dim=1).double()
    past = item + v["watched"] + signs @ model.history.weight
    for place, before in pasts(b):
        h, e = past[before], item[place].expand(len(before), -1)
        weights = model.unit(torch.cat([h, e, h - e, h * e], dim=1), 0)
        interest = (weights * h).sum(0)
        both = [interest, item[place], interest * item[place], v["degree"][place], v["page"][place]]
        wanted.append(model.head(torch.cat(both)[None], 0)[0])
    off = tolerance(40, stages=6, size=1e4, dtype=torch.float64)
    torch.testing.assert_close(logits_of(model, b), torch.stack(wanted), **off)


def test_din_pays_for_the_items_of_a_sample_by_how_seldom_training_has_them():
    model, free = (double(build("din prelu l2", l2=l2)) for l2 in (0.5, 0.0))
    b = shown()
    counts = CATALOGUE.training_counts.clamp_min(1)[b.items_T]
    paid = 0.5 / 2 * (model.tables["items"].weight[b.items_T].square().sum(1) / counts).sum()
    off = tolerance(40, stages=6, size=1e4, dtype=torch.float64)
    torch.testing.assert_close(loss_of(model, b) - loss_of(free, b), paid, **off)


def test_dlrm_is_its_formula():
    model, b = double(build("dlrm")), partly_labelled()
    v, labels = known_of(model, b)
    past, wanted = v["items"] + v["watched"], []
    for place, before in pasts(b):
        n = len(before)
        told = [labels[before, task][~labels[before, task].isnan()].double() for task in range(2)]
        shares = [known.mean().item() if len(known) else 0.0 for known in told]
        numbers = [n, *shares, *(len(known) for known in told)]
        numbers = torch.tensor(numbers, dtype=torch.float64)
        numbers[[0, 3, 4]] = numbers[[0, 3, 4]].log1p()
        dense = model.bottom(numbers[None], 0)[0]
        liked = [v["items"][before[labels[before, task] == 1]] for task in range(2)]
        means = [some.mean(0) if len(some) else torch.zeros(8, dtype=torch.float64) for some in liked]
        beside = [v[name][place] for name in ("genre", "degree", "page")]
        vectors = [dense, v["items"][place], past[before].mean(0), *means, *beside]
        products = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        wanted.append(model.head(torch.cat([dense, torch.stack(products)])[None], 0)[0])
    off = tolerance(40, stages=6, size=1e4, dtype=torch.float64)
    torch.testing.assert_close(logits_of(model, b), torch.stack(wanted), **off)


@pytest.mark.parametrize("name", MODELS)
def test_companions_do_not_matter_and_evaluation_gives_the_logits_of_training(name):
    model, b = build(name), shown((6, 1, 4))
    rows, found = logits_of(model, b), model.logits(b)
    off = tolerance(40, stages=6, size=30.0)  # products of other shapes
    torch.testing.assert_close(found[[0, 2]], rows[[4, 7]], **off)
    torch.testing.assert_close(logits_of(model, b.slice(2, 3)), rows[5:], **off)
    assert found[1].isfinite().all() and len(candidates(b)) == 8


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_with_finite_differences(name):
    model, b = double(build(name)), shown()
    assert_slopes(model, lambda: loss_of(model, b), tolerance(**LOSS, dtype=torch.float64)["atol"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 1)])
def test_nothing_to_predict_gives_a_loss_of_no_candidate(name, lengths):
    model, b = build(name), shown(lengths)
    part, total = model.supervise(b, 5), loss_of(model, b)
    assert part.count == 0 and total.isfinite()
    total.backward()
    assert [n for n, p in model.named_dense() if p.grad is None] == []


def test_dice_is_a_gate_around_the_mean_of_a_row():
    dice = Dice(4)
    with torch.no_grad():
        dice.alpha.fill_(0.25)
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    gate = ((x - 3) / 3.5**0.5).sigmoid()
    torch.testing.assert_close(dice(x), gate * x + (1 - gate) * 0.25 * x)
