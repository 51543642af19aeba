"""Retrieval as a whole."""

import pytest
import torch
from torch import nn

from gr.batch import UNKNOWN
from gr.errors import UserError
from gr.models.init import initialise, normal
from gr.models.layers import Linear
from gr.train.engines.engine import parameters
from tests.precision import tolerance
from tests.unit.models_common import (
    LENGTHS,
    assert_slopes,
    batch,
    in_double,
    loss_of,
    named,
    randomise,
    retrieval,
    run_config,
)

ITEMS = 40
# An encoder's ten sums of up to 32 terms before the scores; a loss adds up some 25 targets of logits up to 20 and more.
SCORES = tolerance(32, stages=10, size=20.0)
LOSSES = {"terms": 32, "stages": 12, "size": 500.0}
LOSS = tolerance(**LOSSES)
MODELS = {
    "hstu": {},
    "sasrec": {"encoder": "sasrec", "objective": "bce"},
    "gru4rec": {"encoder": "gru4rec", "objective": "in_batch"},
    "bert4rec": {
        "encoder": {"name": "transformer", "causal": False, "norm": "post", "input_norm": True},
        "task": "cloze",
        "objective": "full_softmax",
        "model": {"similarity": {"normalize": False, "temperature": 1.0, "item_bias": True}},
    },
}


def build(name="hstu", **changes):
    return retrieval(run_config(**{**MODELS[name], **changes}), ITEMS)


def loss(model, b, targets=None):
    supervision = model.supervise(b, key=5)
    candidates = supervision.targets_S if targets is None else targets
    return loss_of(model, supervision, candidates=candidates)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_with_finite_differences(name):
    model, b = in_double(randomise(build(name))).eval(), batch(items=ITEMS)
    assert_slopes(model, lambda: loss(model, b), tolerance(**LOSSES, dtype=torch.float64)["atol"])


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_sum_to_the_batch(name):
    model = randomise(build(name)).eval()
    b = batch(items=ITEMS)
    targets = model.supervise(b, 5).targets_S
    whole = loss(model, b, targets)
    halves = sum(loss(model, part, targets) for part in b.split(10))
    torch.testing.assert_close(whole, halves, **LOSS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (0, 1, 1)])
def test_empty_batches_give_every_parameter_a_gradient(name, lengths):
    model = build(name)
    total = loss(model, batch(lengths, ITEMS))
    assert total.isfinite()
    total.backward()
    assert [n for n, p in named(model).items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.scores(batch(lengths, ITEMS)).shape == (len(lengths), ITEMS)


@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_look_at_the_target_and_agree_with_topk(name):
    model = randomise(build(name)).train()
    model.encoder.eval()
    b = batch(items=ITEMS)
    ends = b.offsets_B1[1:][b.offsets_B1.diff() > 0] - 1
    unknown = b.with_columns(item=b.items_T.index_fill(0, ends, UNKNOWN))
    scores = model.scores(unknown)
    assert torch.equal(scores, model.scores(b))  # dropout is off, too
    assert model.training and not model.encoder.training, "modes come back as they were"
    assert scores.dtype == torch.float32
    assert not scores.requires_grad

    offsets = torch.tensor([0, 2, 2, 2, 3, 3, 3])
    exclude = (offsets, torch.tensor([5, 0, 39]))
    best, rows = model.topk(b, 4, exclude)
    for s, r in [(0, 5), (0, 0), (3, 39)]:
        scores[s, r] = -torch.inf
    torch.testing.assert_close(best, scores.topk(4, dim=1).values, **SCORES)
    torch.testing.assert_close(scores.gather(1, rows), best, **SCORES)


def test_a_sequence_without_history_has_a_zero_query():
    model = randomise(build())
    queries = model.encode(batch((1, 4), ITEMS))
    assert (queries[0] == 0).all()
    assert (queries[1] != 0).any()
    assert (model.scores(batch((1, 4), ITEMS))[0] == 0).all()


def test_the_time_of_the_request_counts_and_must_be_there():
    model, b = randomise(build()), batch(items=ITEMS)
    later = b.with_columns(time=b.timestamps_T.index_add(0, b.offsets_B1[1:2] - 1, torch.tensor([9**9])))
    moved = (model.scores(b) - model.scores(later)).abs().amax(dim=1) > 1e-6
    assert moved.tolist() == [True] + [False] * (len(LENGTHS) - 1)
    with pytest.raises(UserError, match=r"relative_time=false"):
        model.scores(batch(items=ITEMS, times=False))
    without = build(encoder={"name": "hstu", "relative_time": False})
    assert without.scores(batch(items=ITEMS, times=False)).isfinite().all()


def test_parameters_start_from_seed_and_name():
    first, same, other = build(), build(), build(train={"seed": 2})
    deeper = build(encoder={"name": "hstu", "layers": 5})
    for name, value in named(first).items():
        assert torch.equal(value, named(same)[name])
        assert torch.equal(value, named(deeper)[name])
        if value.any():  # biases start from zero
            assert not torch.equal(value, named(other)[name]), name


def test_initialisation_does_not_depend_on_the_order_of_construction():
    def pair(names):
        return nn.ModuleDict({n: Linear(4, 3, normal(1.0)) for n in names})

    a, b = pair(["left", "right"]), pair(["right", "left"])
    initialise(a, 3)
    torch.manual_seed(99)
    initialise(b, 3)
    assert torch.equal(a["left"].weight, b["left"].weight)
    assert not torch.equal(a["left"].weight, a["right"].weight)
    with pytest.raises(TypeError, match="says nothing about 'weight'"):
        initialise(nn.Linear(2, 2), 1)


def test_the_published_first_values():
    model = build(dim=32, length=200, encoder={"name": "hstu", "qk_dim": 32, "v_dim": 32})
    layer = model.encoder.layers[0]
    for value, std in [
        (layer.uvqk.weight, 0.02),
        (layer.position_bias, 0.02),
        (layer.time_bias, 0.02),
        (layer.output.weight, (2 / 64) ** 0.5),
        (model.input.positions, (2 / 232) ** 0.5),
        (model.items.weight, 0.02 * 0.8796),
    ]:
        assert value.std().item() == pytest.approx(std, rel=5 / value.numel() ** 0.5)
    assert (layer.output.bias == 0).all()
    assert layer.output.weight.abs().max() <= (6 / 64) ** 0.5  # uniform
    assert layer.divisor == 211


@pytest.mark.parametrize("linear_std,positions", [(None, "truncated_normal"), (0.02, "normal")])
def test_the_first_values_of_both_public_sasrecs(linear_std, positions):
    encoder = {"name": "sasrec", "heads": 1, "ffn": 64, "linear_std": linear_std}
    model = build(dim=64, length=200, encoder=encoder, model={"input": {"positions": positions}})
    block = model.encoder.blocks[0]
    xavier = (2 / 128) ** 0.5
    for value, std in [
        (block.query.weight, (2 / 256) ** 0.5),
        (block.key_value.weight, (2 / 256) ** 0.5),
        (block.output.weight, linear_std or xavier),
        (block.ffn.up.weight, linear_std or xavier),
        (block.ffn.down.weight, linear_std or xavier),
        (model.input.positions, 0.02 if linear_std else 0.8796 / 8),
    ]:
        assert value.std().item() == pytest.approx(std, rel=5 / value.numel() ** 0.5)
    for bias in (block.ffn.up.bias, block.ffn.down.bias):
        assert bias.abs().max() <= 1 / 8
        assert bool(bias.any()) == (linear_std is None)
    assert not block.query.bias.any() and not block.key_value.bias.any() and not block.output.bias.any()


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_come_first_among_the_parameters_and_are_no_part_of_the_module(name):
    model = build(name)
    tables = [n for n in named(model) if n.startswith("tables.")]
    biased = name == "bert4rec"
    assert tables == ["tables.items.weight", *(["tables.items.bias"] if biased else [])]
    assert list(named(model))[: len(tables)] == tables
    assert named(model)["tables.items.weight"].shape == (ITEMS, 8)
    own = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in named(model).values()) == own + ITEMS * 8 + ITEMS * biased
    assert not any(module is model.items for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoints_parameters_are_all_once_and_the_models_own_memory(name):
    model = build(name)
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    assert set(parameters(model)) == {f"model/{n}" for n in named(model)}
    other = build(name, train={"seed": 9})
    for key, values in parameters(other).items():
        values.copy_(parameters(model)[key])
    assert torch.equal(other.scores(batch(items=ITEMS)), model.scores(batch(items=ITEMS)))


def test_bf16_autocast_trains():
    model, b = build().eval(), batch(items=ITEMS)
    exact = loss(model, b)
    with torch.autocast("cpu", torch.bfloat16):
        rough = loss(model, b)
    assert rough.dtype == torch.float32
    # sums of bfloat16 factors: a norm and two layers of 8 terms before the scores
    torch.testing.assert_close(rough, exact, **tolerance(2, dtype=torch.bfloat16))
    rough.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in named(model).values())
