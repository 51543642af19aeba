"""Optimisers do the maths that their names promise; the schedule is what can be computed by hand."""

import math

import pytest
import torch
from torch import nn

from gr.config import ParameterGroup, ScheduleSection
from gr.errors import UserError
from gr.train.optimizers import SGD, AdamW, check_rules, parameter_groups, set_rate
from gr.train.schedule import rate_factor
from tests.precision import tolerance


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 2)


def named(model):
    return list(model.named_parameters())


def rule(match, **values):
    return ParameterGroup(match=match, **values)


def test_the_first_rule_that_matches_takes_a_parameter_and_the_rest_keep_the_defaults():
    model = Model()
    rules = [rule(r"^layer\.weight$", lr=0.5), rule("layer|table", weight_decay=0.25)]
    first, second = parameter_groups(named(model), rules, lr=0.1, weight_decay=0.01)
    assert (first["lr"], first["base_lr"], first["weight_decay"]) == (0.5, 0.5, 0.01)
    assert (second["lr"], second["weight_decay"]) == (0.1, 0.25)
    assert [p is model.layer.weight for p in first["params"]] == [True]
    assert {id(p) for p in second["params"]} == {id(model.table.weight), id(model.layer.bias)}
    nothing = rule("table", lr=0.0, weight_decay=0.0)  # a value like others, and not its absence
    first, rest = parameter_groups(named(model), [nothing], lr=0.1, weight_decay=0.01)
    assert (first["lr"], first["weight_decay"]) == (0.0, 0.0)
    assert (rest["lr"], rest["weight_decay"], len(rest["params"])) == (0.1, 0.01, 2)


@pytest.mark.parametrize(
    "rules,sentence",
    [
        (["tabel"], "'tabel' fits no parameter"),
        (["layer", "bias"], "'bias' fits no parameter, or none that an earlier rule leaves"),
        (["layer.(weight"], "is no regular expression"),
    ],
)
def test_a_rule_that_takes_nothing_is_refused(rules, sentence):
    with pytest.raises(UserError) as refusal:
        given = [rule(match) for match in rules]
        parameter_groups(named(Model()), given, lr=0.1, weight_decay=0.0)
        check_rules(given, [name for name, _ in named(Model())])
    assert sentence in str(refusal.value)


def test_the_schedule_scales_each_groups_own_rate():
    model = Model()
    optimizer = AdamW(AdamW.Config(lr=0.1, groups=[rule("table", lr=0.4)])).dense(named(model))
    set_rate(optimizer.param_groups, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.2  # what a run logs: Engine.rate
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.05]
    set_rate(optimizer.param_groups, 0.25)  # of the base rate, not of the last one
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.025]


def gradients(steps, shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_adamw_is_adam_with_decoupled_decay():
    model = Model()
    config = AdamW.Config(lr=0.1, betas=[0.8, 0.9], eps=1e-3, weight_decay=0.2, implementation="torch")
    optimizer = AdamW(config).dense(named(model))
    parameter = model.table.weight
    expected = parameter.detach().double()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for t, gradient in enumerate(gradients(5, expected.shape), start=1):
        parameter.grad = gradient.float()
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.2)
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        expected -= 0.1 * (first / (1 - 0.8**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-3)
    # five steps of a dozen operations each, of moments and of terms below 1
    torch.testing.assert_close(parameter.detach().double(), expected, **tolerance(12, stages=5))


def test_adamw_moves_rows_without_a_gradient_too():
    model = Model()
    optimizer = AdamW(AdamW.Config(lr=0.1, weight_decay=0.5)).dense(named(model))
    before = model.table.weight.detach().clone()
    model.table(torch.tensor([1])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.table.weight[0], before[0] * 0.95, **tolerance(3))


def test_sgd_adds_momentum_and_coupled_decay():
    model = Model()
    optimizer = SGD(SGD.Config(lr=0.1, momentum=0.5, weight_decay=0.2)).dense(named(model))
    parameter = model.layer.weight
    expected, velocity = parameter.detach().double(), 0.0
    for gradient in gradients(4, expected.shape):
        parameter.grad = gradient.float()
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.2 * expected
        expected = expected - 0.1 * velocity
    # four steps of six operations, of terms below 4
    torch.testing.assert_close(parameter.detach().double(), expected, **tolerance(6, stages=4, size=4.0))


def test_the_schedule_by_hand():
    def factors(name, steps, **values):
        schedule = ScheduleSection(name=name, **values)
        return [rate_factor(schedule, step, total_steps=10) for step in steps]

    assert factors("constant", [0, 5, 9, 99]) == [1, 1, 1, 1]
    assert factors("constant", [0, 1, 3, 4, 9], warmup_steps=4) == [0.25, 0.5, 1, 1, 1]
    assert factors("linear", [0, 5, 10, 99]) == [1, 0.5, 0, 0]
    # warm-up over 2 steps, then 8 steps from 1 down to 0.2
    linear = factors("linear", [0, 1, 2, 6, 9, 10], warmup_steps=2, final_fraction=0.2)
    assert linear == pytest.approx([0.5, 1, 1, 0.6, 0.3, 0.2])
    cosine = factors("cosine", [0, 1, 2, 4, 6, 10, 11], warmup_steps=2, final_fraction=0.2)
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert cosine == pytest.approx([0.5, 1, 1, quarter, 0.6, 0.2, 0.2])
    assert factors("linear", [0, 9], warmup_steps=10) == [0.1, 1]  # warm-up fills the run
