"""Candidates of a request as rows of their own: what each of them knows, and that it's what one alone would."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gr.batch import TARGETS_FROM, Jagged
from gr.errors import UserError
from gr.models.layout import JaggedLayout
from gr.models.step import StepContext
from tests.precision import tolerance
from tests.unit import test_models_interleaved as interleaved
from tests.unit.test_models_interleaved import logits_of, other, shown
from tests.unit.test_models_ranking import loss_of

ENCODERS = {
    "hstu": "hstu",
    "sasrec": {"name": "sasrec", "layers": 2, "heads": 2, "ffn": 8, "dropout": 0.0, "attention_dropout": 0.0},
}
LENGTHS = (7, 0, 1, 4)
REQUESTS = ((0,), (1, 2), (3,), (4, 5, 6)), (), ((0,),), ((0,), (1, 2), (3,))
"""Places in each sequence that are one request."""


def build(encoder="hstu", **model):
    return interleaved.build(ENCODERS.get(encoder, encoder), actions="together", **model)


def asked(seed=0):
    """A batch whose requests are REQUESTS."""
    b, first = shown(LENGTHS, seed), {}
    for start, requests in zip(b.offsets_B1.tolist(), REQUESTS):
        first |= {start + place: start + request[0] for request in requests for place in request}
    return b.with_columns(time=b.columns["time"][torch.tensor([first[a] for a in range(b.actions)])])


def judged():
    """(sequence, place, place of its request) of every candidate."""
    return [
        (sequence, place, request[0])
        for sequence, requests in enumerate(REQUESTS)
        for request in requests[1:]
        for place in request
    ]


def alone(b, sequence, place):
    """A batch of one sequence up to this action, which is its one target."""
    one = b.slice(sequence, sequence + 1)
    return dataclasses.replace(
        one,
        offsets_B1=torch.tensor([0, place + 1]),
        lengths=(place + 1,),
        columns={name: column[: place + 1] for name, column in one.columns.items()},
        user_columns={**one.user_columns, TARGETS_FROM: torch.tensor([place])},
    )


def in_double(encoder):
    model = build(encoder).double()
    for table in model.tables.values():
        table.double()
    return model


def by_hand(model, b):
    """(1, K) logits of a sequence's last action: the rows that its request knows and its own behind them, through the
    encoder as any sequence."""
    part = model.supervise(b, 5)
    views = model.fetch(model.wanted([part], StepContext(0)))
    x_TD, items_AD, beside_AD = model.interleaved(part, views)
    rows, time = len(x_TD) + 1, part.times_A[-1:]
    times = torch.cat([part.layout.query_times_T, time])
    x_TD = torch.cat([x_TD, items_AD[-1:] + beside_AD[-1:]])
    layout = JaggedLayout(torch.tensor([0, rows]), (rows,), rows, times, times)
    return model.head(model.encoder(x_TD, layout)[-1:], items_AD[-1:], 0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_at_once_is_each_by_itself(encoder):
    """Losses, and the gradients of every parameter; and the logits are those of a plain sequence that ends with the
    candidate."""
    model, b = in_double(encoder), asked()
    part = model.supervise(b, 5)
    assert part.counts == (2, 1, 3, 2, 1) and part.count == 9 == len(judged())
    assert part.layout.lengths == (5, 0, 1, 4), "a context, and what the last request knows"
    parameters = [p for _, p in model.named_dense()]
    whole = loss_of(model, b)
    found = torch.autograd.grad(whole, parameters)
    each = [loss_of(model, alone(b, sequence, place)) for sequence, place, _ in judged()]
    size = sum(each).item()
    torch.testing.assert_close(whole, sum(each), **tolerance(200, stages=20, size=size, dtype=torch.float64))
    for own, (name, _), one in zip(
        found, model.named_dense(), torch.autograd.grad(sum(each), parameters), strict=True
    ):
        off = tolerance(200, stages=20, size=float(one.abs().max()) + 1, dtype=torch.float64)
        torch.testing.assert_close(own, one, **off, msg=name)
    plain = torch.cat([by_hand(model, alone(b, sequence, place)) for sequence, place, _ in judged()])
    off = tolerance(200, stages=20, size=plain.abs().max().item(), dtype=torch.float64)
    torch.testing.assert_close(logits_of(model, b), plain.detach(), **off)


def test_no_candidate_knows_what_became_of_its_request_or_of_later_ones():
    model, b = build(), asked()
    before, starts = logits_of(model, b), b.offsets_B1.tolist()
    for sequence, n in enumerate(LENGTHS):
        for place in range(n):
            for column in ("item", "page", "value", "type", "watched"):
                after = logits_of(model, other(b, column, starts[sequence] + place))
                moved = (after != before).any(1).tolist()
                # an earlier request's action counts with all that is known of it; of one's own, what was asked
                wanted = [
                    its == sequence and (place < request or (place == own and column in ("item", "page")))
                    for its, own, request in judged()
                ]
                assert moved == wanted, (sequence, place, column)


def test_the_order_of_a_request_changes_nothing():
    model, b = build(), asked()
    order = torch.arange(b.actions)
    order[[4, 5, 6]] = torch.tensor([6, 4, 5])
    turned = b.with_columns(**{name: column[order] for name, column in b.columns.items()})
    before, after = logits_of(model, b), logits_of(model, turned)
    off = tolerance(200, stages=20, size=float(before.abs().max()))
    torch.testing.assert_close(after[[3, 4, 5]], before[[5, 3, 4]], **off)


def test_evaluation_and_many_candidates_at_once_give_the_logits_of_training():
    model, b = build(), asked().slice(0, 1)
    rows = logits_of(model, b)
    off = tolerance(200, stages=20, size=float(rows.abs().max()))
    torch.testing.assert_close(model.logits(b)[0], rows[-1], **off)
    items = b.columns["item"]
    found = model.scores(b, Jagged(torch.tensor([0, 3]), torch.stack([items[3], items[6], items[0]])), 2)
    torch.testing.assert_close(found[1], rows[-1], **off)


def test_a_named_column_says_what_was_shown_together():
    model, b = build(request="page"), shown((5,))
    b = b.with_columns(page=torch.tensor([1, 1, 3, 3, 1]))
    part = model.supervise(b, 5)
    assert part.counts == (2, 1) and part.targets_S_in_A.tolist() == [2, 3, 4]
    assert "page" in model.needs and model.columns_of_requests == ["page"]
    bare = {"input": {"dropout": 0.0, "features": {}}, "context": []}
    assert build(request="watched", **bare).columns_of_requests == ["watched"]
    assert build(**bare).columns_of_requests == ["time"]


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 1)])
def test_nothing_to_predict_gives_zero_and_every_parameter_a_gradient(lengths):
    model = build()
    total = loss_of(model, shown(lengths))
    total.backward()
    assert total.item() == 0
    assert [n for n, p in model.named_dense() if p.grad is None or p.grad.any()] == []


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"request": "pgae"}, "'model.request' is 'pgae', which is no column .*did you mean 'page'"),
        ({"request": "value"}, "'model.request' is 'value', and that column holds numbers with decimals"),
        (
            {"request": "watched", "tasks": {"long": {"column": "watched", "at_least": 2}}},
            "'model.request' tells a prediction column 'watched', which is what model.tasks.long predicts",
        ),
        ({"encoder": "gru4rec"}, "model.encoder gru4rec reads row after row"),
        (
            {"encoder": {**ENCODERS["sasrec"], "attention_dropout": 0.1}},
            "set model.encoder.attention_dropout=0",
        ),
    ],
)
def test_what_cannot_be_built_is_one_sentence(model, sentence):
    with pytest.raises(UserError, match=sentence):
        interleaved.build(model.pop("encoder", "hstu"), actions="together", **model)
