"""Items and actions as rows of their own: what an item's row knows, and what it can't know."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from gr import config as configs
from gr.batch import TARGETS_FROM
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.models.interleaved import Interleaving
from gr.models.step import StepContext
from gr.processes import Processes
from tests.precision import tolerance
from tests.unit.models_common import assert_slopes, generator
from tests.unit.test_models_ranking import (
    COLUMNS,
    ENCODERS,
    ITEMS,
    LOGITS,
    LOSS,
    labelled,
    loss_of,
    run_config,
)

LENGTHS = (6, 0, 1, 4)
FEATURES = {
    "degree": {"column": "degree", "rows": 3},
    "page": {"column": "page", "of_request": True, "rows": 4},
    "watched": {"column": "watched", "rows": 4},
    "genre": {"catalogue": "genre"},
}
GENRES = torch.arange(ITEMS) % 5
CATALOGUE = SimpleNamespace(
    rows=ITEMS,
    manifest=SimpleNamespace(
        columns=[
            *COLUMNS,
            ColumnInfo("time", "int64"),
            ColumnInfo("page", "int64"),
            ColumnInfo("watched", "int64"),
            ColumnInfo("degree", "int64", "users"),
        ],
        action_type_names=["buy", "rent", "view"],
        users=99,
    ),
    column_names=["genre"],
    info=lambda name: ColumnInfo(name, "int64", "items"),
    codes=lambda name: GENRES,
)


def build(encoder="hstu", whole=None, **model):
    """``whole``: all that the config says of the model."""
    sections = {"actions": "interleaved", "context": ["degree"], "interaction": "product", **model}
    if isinstance(encoder, dict):
        sections["encoder"], encoder = encoder, "hstu"
    config = run_config(encoder, model={"input": {"dropout": 0.0, "features": FEATURES}, **sections})
    if whole is not None:
        config = configs.from_dict({**configs.to_dict(config), "model": whole})
    made = config.model.build(config, CATALOGUE, Processes(torch.device("cpu")))
    g = generator(1)
    values = [piece.values_RC for table in made.tables.values() for piece in table.pieces()]
    values += [parameter for _, parameter in made.named_parameters()]
    with torch.no_grad():
        for value in values:
            value.copy_(torch.randn(value.shape, generator=g, dtype=torch.float64) * 0.5)
    return made.eval()


def shown(lengths=LENGTHS, seed=0):
    b, g = labelled(lengths, seed), generator(seed + 9)
    pages, watched = (torch.randint(0, 4, (b.actions,), generator=g) for _ in range(2))
    degrees = torch.randint(0, 3, (b.sequences,), generator=g)
    known = b.columns["value"].nan_to_num(2.0)
    b = b.with_columns(value=known, page=pages, watched=watched)
    return dataclasses.replace(b, user_columns={"degree": degrees})


def logits_of(model, b):
    """(S, K): of every action but the first of each sequence."""
    part, context = model.supervise(b, 5), StepContext(5)
    with torch.no_grad():
        return model._logits(part, dataclasses.replace(context, views=model.views([part], context)))


def candidates(b):
    """(S,) places of the actions that are judged."""
    starts = b.offsets_B1[:-1].tolist()
    return [start + i for start, n in zip(starts, b.lengths) for i in range(1, n)]


def other(b, column, place):
    """The batch with another value of ``column`` at ``place``."""
    values = b.columns[column].clone()
    values[place] = {"value": 6 - values[place] if values[place] != 3 else 1.0}.get(
        column, (values[place] + 1) % (10**6 if column == "time" else 3)
    )
    if column == "type":  # from one side of the rule to the other
        values[place] = 2 if b.columns["type"][place] < 2 else 0
    return b.with_columns(**{column: values})


def known_too_early(model, b):
    """(column, place, judged action) where a label, or what becomes known with it, moves a logit of its own action or
    of one before it."""
    before, found = logits_of(model, b), []
    for place in range(b.actions):
        for column in ("value", "type", "watched"):
            moved = (logits_of(model, other(b, column, place)) != before).any(1).tolist()
            found += [
                (column, place, judged)
                for judged, one in zip(candidates(b), moved, strict=True)
                if one and judged <= place
            ]
    return found


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_no_prediction_knows_its_own_label_or_a_later_one(encoder):
    assert known_too_early(build(encoder), shown()) == []


def test_that_test_sees_a_leak(monkeypatch):
    """Answers from the row after an item's, where what was done with it is known."""
    made = Interleaving._made

    def leaking(self, batch, *rest, **named):
        part = made(self, batch, *rest, **named)
        last = part.layout.offsets_B1[1:] - 1
        own = torch.isin(part.queries_S, last)  # behind those there is no row
        return dataclasses.replace(part, queries_S=part.queries_S + (~own).long())

    monkeypatch.setattr(Interleaving, "_made", leaking)
    assert known_too_early(build(), shown())


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_every_earlier_action_and_what_is_known_of_the_moment_counts(encoder):
    model, b = build(encoder), shown((5,))
    before = logits_of(model, b)
    for place in range(5):
        for column in ("item", "page", "value", "type", "watched"):
            moved = (logits_of(model, other(b, column, place)) != before).any(1).tolist()
            first = (
                place if column in ("item", "page") else place + 1
            )  # the judged action from which on it counts
            assert moved == [judged >= first for judged in range(1, 5)], (column, place)
    user = dataclasses.replace(b, user_columns={"degree": (b.user_columns["degree"] + 1) % 3})
    assert (logits_of(model, user) != before).all()


def test_the_future_may_be_anything():
    """All that comes after an action, in any order, with any labels and times: no bit of the action's logits moves."""
    model, b = build(), shown((6, 5))
    before, g = logits_of(model, b), generator(3)
    for stop in range(1, 6):
        order = torch.arange(b.actions)
        for start, n in zip(b.offsets_B1.tolist(), b.lengths):
            order[start + stop : start + n] = start + stop + torch.randperm(n - stop, generator=g)
        columns = {name: column[order] for name, column in b.columns.items()}
        columns["time"] = columns["time"] + (torch.arange(b.actions) != order) * 1000
        after = logits_of(model, b.with_columns(**columns))
        same = [judged - start < stop for judged, start in zip(candidates(b), [0] * 5 + [6] * 4)]
        assert torch.equal(after[same], before[same])


@pytest.mark.parametrize("actions", ["interleaved", "summed"])
def test_evaluation_and_training_give_the_same_logits_and_a_first_action_has_some(actions):
    model, b = build(actions=actions, interaction="all"), shown((6, 1, 4))
    rows, found = logits_of(model, b), model.logits(b)
    torch.testing.assert_close(
        found[[0, 2]], rows[[4, 7]], **LOGITS
    )  # the head multiplies another number of rows
    assert found[1].isfinite().all()
    last = b.offsets_B1[1:] - 1
    blind = b.with_columns(
        value=b.columns["value"].index_fill(0, last, torch.nan),
        watched=b.columns["watched"].index_fill(0, last, 0),
    )
    assert torch.equal(model.logits(blind), found)


def test_the_targets_that_a_batch_names_are_asked_for_alone():
    model, b = build(), shown()
    from_B = torch.tensor([4, 1, 1, 2])
    part = model.supervise(dataclasses.replace(b, user_columns={**b.user_columns, TARGETS_FROM: from_B}), 5)
    assert part.targets_S_in_A.tolist() == [4, 5, 9, 10] and part.count == 4
    assert part.layout.lengths == (12, 0, 2, 8)


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 1)])
def test_nothing_to_predict_gives_zero_and_every_parameter_a_gradient(lengths):
    model = build()
    total = loss_of(model, shown(lengths))
    assert total.item() == 0
    total.backward()
    assert [n for n, p in model.named_dense() if p.grad is None or p.grad.any()] == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_agree_with_finite_differences(encoder):
    model, b = build(encoder).double(), shown()
    for table in model.tables.values():
        table.double()
    assert_slopes(model, lambda: loss_of(model, b), tolerance(**LOSS, dtype=torch.float64)["atol"])


@pytest.mark.parametrize("name", ["ranking", "din", "dlrm"])
def test_a_model_that_is_told_what_it_predicts_is_refused(name):
    tasks = {"long": {"column": "watched", "at_least": 2}}
    features = {"told": {"column": "watched", "of_request": True, "rows": 4}}
    model = {"name": name, "dim": 8, "tasks": tasks, "input": {"features": features}}
    if name == "ranking":
        model["encoder"] = "hstu"
    with pytest.raises(
        UserError,
        match=r"features.told' tells a prediction column 'watched', which is what model\.tasks\.long",
    ):
        build(whole=model)


def test_tasks_weigh_as_they_say():
    tasks = {
        "like": {"column": "value", "at_least": 3},
        "bought": {"column": "type", "any_of": ["buy"], "weight": 3.0},
    }
    model, b = build(tasks=tasks), shown()
    each_SK = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_of(model, b).double(), model.supervise(b, 5).labels_SK.double(), reduction="none"
    )
    like, bought = each_SK.sum(0)
    found = loss_of(model, b).double()
    torch.testing.assert_close(
        found, (like + 3 * bought) / 4, **tolerance(len(each_SK), size=float(each_SK.sum()))
    )


@pytest.mark.parametrize("name", ["page", "nothing"])
def test_a_context_that_is_no_feature_of_users_is_refused(name):
    with pytest.raises(
        UserError, match=f"'model.context' has '{name}', which is no feature of users.*degree"
    ):
        build(context=[name])
    with pytest.raises(UserError, match="'degree' stands in it twice"):
        build(context=["degree", "degree"])
