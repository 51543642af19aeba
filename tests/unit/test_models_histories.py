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


def build(name):
    model = {**MODELS[name], "dim": 8, "tasks": TASKS, "input": {"features": FEATURES}}
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
    model, b = build(name).double(), shown()
    for table in model.tables.values():
        table.double()
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
