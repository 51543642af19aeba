"""The ranking model: its loss and gradients, what a row may know, processes' parts, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from gr import config as configs
from gr.batch import TARGETS_FROM, UNKNOWN
from gr.data.columns import ColumnInfo
from gr.errors import UserError
from gr.models.ranking import Head, Ranking
from gr.models.step import StepContext
from gr.processes import Processes
from gr.train.engines.all_reduce import AllReduce
from gr.train.engines.ddp import DDP
from tests.precision import after_steps, analysed, assert_within, tolerance
from tests.unit.models_common import LENGTHS, assert_slopes, batch, generator

ITEMS = 40
# An encoder's and a head's sums of up to 24 terms before the logits; a loss adds up those of 25 labels of each task.
LOGITS = tolerance(24, stages=10, size=3.0)
LOSS = {"terms": 24, "stages": 12, "size": 100.0}
TASKS = {"like": {"column": "value", "at_least": 3}, "bought": {"column": "type", "any_of": ["buy", "rent"]}}
COLUMNS = [ColumnInfo("item", "int32"), ColumnInfo("type", "int32"), ColumnInfo("value", "float32")]
CATALOGUE = SimpleNamespace(
    rows=ITEMS, manifest=SimpleNamespace(columns=COLUMNS, action_type_names=["buy", "rent", "view"])
)
ENCODERS = {
    "hstu": {"name": "hstu", "dropout": 0.0},
    "sasrec": {"name": "sasrec", "dropout": 0.0, "attention_dropout": 0.0},
    "gru4rec": {"name": "gru4rec"},
}


def run_config(encoder="hstu", **sections):
    model = {"name": "ranking", "dim": 8, "encoder": ENCODERS[encoder], "tasks": TASKS, "hidden": [6]}
    raw = {"data": {"path": "none", "max_length": 10}, "optimizer": {"name": "sgd", "lr": 0.1}}
    raw["model"] = {**model, "input": {"dropout": 0.0}, **sections.pop("model", {})}
    return configs.from_dict({**raw, **sections})


def build(encoder="hstu", large=True, **sections):
    """``large``: parameters of unit scale, at which mistakes show."""
    config = run_config(encoder, **sections)
    processes = Processes(torch.device("cpu"))
    model = config.model.build(config, CATALOGUE, processes)
    g = generator(1)
    values = [piece.values_RC for table in model.tables.values() for piece in table.pieces()]
    values += [parameter for _, parameter in model.named_parameters()]
    with torch.no_grad():
        for value in values if large else []:
            value.copy_(torch.randn(value.shape, generator=g, dtype=torch.float64) * 0.5)
    return model


def labelled(lengths=LENGTHS, seed=0):
    b = batch(lengths, ITEMS, seed)
    g = generator(seed + 50)
    values = torch.randint(1, 6, (b.actions,), generator=g).float()
    values[torch.rand(b.actions, generator=g) < 0.2] = torch.nan
    return b.with_columns(value=values, type=torch.randint(0, 3, (b.actions,), generator=g))


def loss_of(model, b, key=5):
    part = model.supervise(b, key)
    context = StepContext(key)
    return model(part, dataclasses.replace(context, views=model.views([part], context)))


def changed(b, column, place, value):
    return b.with_columns(**{column: b.columns[column].clone().index_fill_(0, torch.tensor([place]), value)})


def logits_of_rows(model, b):
    """(S, K): the training logits of every next action."""
    part = model.eval().supervise(b, 5)
    return model._logits(part, StepContext(5, views=model.views([part], StepContext(5))))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_loss_is_the_mean_over_tasks_of_known_labels_cross_entropy(encoder):
    model, b = build(encoder).eval(), labelled()
    logits = logits_of_rows(model, b).detach().double()
    values, types, signed, row = b.columns["value"].tolist(), b.columns["type"].tolist(), [], 0
    for start, length in zip(b.offsets_B1.tolist(), b.lengths):
        for place in range(start + 1, start + length):
            like, bought = logits[row]
            if values[place] == values[place]:
                signed.append(like if values[place] >= 3 else -like)
            signed.append(bought if types[place] < 2 else -bought)
            row += 1
    part = model.supervise(b, 5)
    assert row == part.count == part.targets_S.shape[0] == sum(max(n - 1, 0) for n in LENGTHS)
    signed = torch.stack(signed)
    exact, allowed = analysed(lambda: {"loss": -(signed.sigmoid().log() / 2).sum()}, torch.float32)
    assert_within({"loss": loss_of(model, b)}, exact, allowed, torch.float32)
    assert torch.isnan(b.columns["value"]).any(), "the case has no unknown label"


def test_where_a_batch_says_which_actions_are_targets_these_logits_alone_are_asked_for():
    model, b = build().eval(), labelled()
    from_B = torch.tensor([max(n - 2, 1) for n in b.lengths])
    part = model.supervise(dataclasses.replace(b, user_columns={TARGETS_FROM: from_B}), 5)
    whole = model.supervise(b, 5)
    rows_S = torch.cat(
        [torch.arange(n - 1)[max(n - 3, 0) :] + start for n, start in zip(b.lengths, _starts(b)) if n > 1]
    )
    assert part.targets_S.tolist() == whole.targets_S[rows_S].tolist()
    assert torch.equal(part.labels_SK.nan_to_num(-1), whole.labels_SK[rows_S].nan_to_num(-1))
    context = StepContext(5, views=model.views([part], StepContext(5)))
    torch.testing.assert_close(model._logits(part, context), logits_of_rows(model, b)[rows_S])


def _starts(b):
    """The first input row of each sequence."""
    return F.pad((torch.tensor(b.lengths) - 1).clamp_min(0).cumsum(0), (1, 0)).tolist()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_agree_with_finite_differences(encoder):
    model, b = build(encoder).eval().double(), labelled()
    model.items.double()
    assert_slopes(model, lambda: loss_of(model, b), tolerance(**LOSS, dtype=torch.float64)["atol"])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 1)])
def test_nothing_to_predict_gives_zero_and_every_parameter_a_gradient(encoder, lengths):
    model, b = build(encoder), labelled(lengths)
    total = loss_of(model, b)
    assert total.item() == 0
    total.backward()
    assert [n for n, p in model.named_dense() if p.grad is None or p.grad.any()] == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_row_knows_the_labels_up_to_its_action_and_no_later_one(encoder):
    model, b = build(encoder), labelled((6, 4))
    b = b.with_columns(value=torch.full((10,), 4.0))
    before = logits_of_rows(model, b)
    for place in range(10):
        for column, value in (("value", 1.0), ("type", (b.columns["type"][place].item() + 2) % 3)):
            after = logits_of_rows(model, changed(b, column, place, value))
            moved = (after != before).any(1).tolist()
            # rows 0..4 are the inputs of the first sequence, 5..7 those of the second; row i's target is action i + 1
            start, stop, own = (0, 5, place) if place < 6 else (5, 8, place - 1)
            told = (column == "value") or (b.columns["type"][place] < 2) != (value < 2)
            assert moved == [start <= row < stop and row >= own and told for row in range(8)], (place, column)


def test_an_unknown_label_is_neither_kind_of_history():
    model, b = build(), labelled((5,))
    kinds = {
        str(value): logits_of_rows(model, changed(b, "value", 1, value))[1] for value in (1.0, 5.0, torch.nan)
    }
    assert len({tuple(row.tolist()) for row in kinds.values()}) == 3


def test_evaluation_and_training_give_the_same_logits():
    model, b = build(model={"input": {"dropout": 0.5}, "hidden_dropout": 0.5}).train(), labelled((9, 2, 5, 8))
    rows = logits_of_rows(build(), b)
    model.encoder.eval()
    ends = torch.tensor([n - 1 for n in b.lengths]).cumsum(0) - 1
    found = model.logits(b)
    torch.testing.assert_close(found, rows[ends], **LOGITS)  # the head multiplies another number of rows
    assert not found.requires_grad
    assert model.training and not model.encoder.training, "modes come back as they were"


def test_evaluation_does_not_look_at_the_labels_it_asks_for():
    model, b = build(), labelled((9, 2, 5, 8))
    last = b.offsets_B1[1:] - 1
    other = b.with_columns(
        value=b.columns["value"].index_fill(0, last, torch.nan),
        type=b.columns["type"].index_copy(0, last, (b.columns["type"][last] + 1) % 3),
    )
    assert torch.equal(model.logits(other), model.logits(b))
    items = b.with_columns(item=b.items_T.index_copy(0, last, (b.items_T[last] + 1) % ITEMS))
    assert (model.logits(items) != model.logits(b)).all(1).all(), "the candidate counts"
    later = b.with_columns(time=b.timestamps_T.index_copy(0, last, b.timestamps_T[last] + 9**9))
    assert (model.logits(later) != model.logits(b)).any(), "its time counts"


@pytest.mark.parametrize("scaled", [True, False])
def test_a_candidate_is_as_large_as_an_input(scaled):
    model, b, seen = build(model={"input": {"dropout": 0.0, "scale": scaled}}), labelled((5, 3)), []
    model.head.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    logits_of_rows(model, b)
    targets = torch.cat([b.items_T[1:5], b.items_T[6:8]])
    assert torch.equal(seen[0], model.items.weight[targets] * (8**0.5 if scaled else 1))


@pytest.mark.parametrize("interaction", ["all", "product"])
def test_a_head_reads_the_query_the_candidate_and_their_product_or_that_alone(interaction):
    head = Head(3, [4], 2, 0.0, interaction).double()
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())))
    h, e = torch.randn(2, 5, 3, generator=generator(1), dtype=torch.float64)
    x = torch.cat([h, e, h * e], 1) if interaction == "all" else h * e
    (layer,) = head.layers
    hidden = (x @ layer.weight.T + layer.bias).clamp_min(0)
    torch.testing.assert_close(head(h, e, 0), hidden @ head.out.weight.T + head.out.bias)


def test_a_sequence_of_one_action_has_no_history_and_an_answer():
    model = build()
    logits = model.logits(labelled((1, 4, 1)))
    assert logits.shape == (3, 2) and logits.isfinite().all()
    with pytest.raises(UserError, match="judges given items"):
        model.logits(changed(labelled((3,)), "item", 2, UNKNOWN))


def test_a_sequence_does_not_depend_on_its_companions():
    model, b = build(), labelled((9, 2, 5, 8))
    alone = torch.cat([model.logits(b.slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(alone, model.logits(b), **LOGITS)


def test_dropout_drops_in_the_input_and_in_the_head():
    b = labelled()
    exact = loss_of(build().train(), b)
    for changes in ({"input": {"dropout": 0.5}}, {"hidden_dropout": 0.5}):
        model = build(model=changes).train()
        assert loss_of(model, b) != exact and loss_of(model.eval(), b) == exact


def test_bf16_autocast_trains_and_logits_are_float32():
    model, b = build(large=False).train(), labelled()
    exact = loss_of(model, b)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss_of(model, b)
        assert model.logits(labelled((9, 2))).dtype == torch.float32
    assert rough.dtype == torch.float32
    # sums of bfloat16 factors: a norm, two layers and two of the head of some 8 terms, of which half cancel
    torch.testing.assert_close(rough, exact, **tolerance(2, dtype=torch.bfloat16))
    rough.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for _, p in model.named_dense())


@pytest.mark.parametrize("engine", [DDP, AllReduce])
@pytest.mark.parametrize("table", ["local", "mapped"])
def test_micro_batches_and_tables_take_the_same_steps(engine, table, tmp_path):
    """Steps of SGD, in which a wrong scale would show."""
    b, processes = labelled((9, 0, 1, 5, 8, 2)), Processes(torch.device("cpu"))

    def trained(kind, parts):
        config = run_config(model={"table": kind})
        model = build(model={"table": kind})
        model_engine = engine.Config().build(
            model, config.optimizer.build(), processes, clip_norm=0.5, bf16=False
        )
        losses = []
        for number in range(3):
            supervised = [model.supervise(part, number) for part in parts]
            count = sum(part.count for part in supervised)
            losses.append(model_engine.forward_backward(supervised, StepContext(number), count).item())
            model_engine.step(1.0)
        return losses, model_engine.tensors()

    losses, tensors = trained("local", [b])
    other_losses, other = trained(table, b.split(10))
    assert len(b.split(10)) > 1 and len(set(losses)) == 3
    # sums over the labels of a batch in another order, of which both round; a loss has at most twice the relative
    # change of the parameters, and these move by 0.1 times a mean of terms below 1
    off = 2 * after_steps(3, terms=2 * 25, condition=2.0)
    torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), rtol=off, atol=0.0)
    assert any(key.startswith("model/tables.items") for key in tensors)
    for key, value in tensors.items():
        values = next(
            iter(getattr(other[key], "parts", {0: other[key]}).values())
        )  # a mapped table's is in one part
        torch.testing.assert_close(values.reshape(value.shape), value, rtol=off, atol=0.1 * off, msg=key)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"objective": "bpr"}, "'objective' is 'bpr', and model 'ranking' has a loss of its own"),
        (
            {"model": {"encoder": {"name": "transformer", "causal": False}}},
            "causal is false.: set model.encoder.causal=true$",
        ),
        ({"model": {"tasks": {"x": {"column": "type", "any_of": ["by"]}}}}, "'by', which is no action type"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(sections, sentence):
    with pytest.raises(UserError, match=sentence):
        build(**sections)


def test_needs_are_the_columns_of_tasks_and_encoder():
    assert build("hstu").needs == {"item", "time", "value", "type"}
    assert build("sasrec").needs == {"item", "value", "type"}
    assert Ranking.judged_by == "pointwise"
