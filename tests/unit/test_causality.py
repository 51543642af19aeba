"""No model is shown what it has to predict: every task with every encoder of the tables, whatever its options."""

import dataclasses
from types import NoneType, SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch

from gr import registry
from gr.errors import UserError
from gr.models.step import StepContext
from tests.unit.models_common import batch, layout, randomise, run_config

DIM, LENGTHS = 8, (5, 2, 1)
CATALOGUE = SimpleNamespace(rows=2 * sum(LENGTHS), training_counts=torch.ones(2 * sum(LENGTHS)))


def options(name):
    """Keys of an encoder's config that are choices, each with every value it can have."""
    found = [{}]
    for key, field in registry.resolve(registry.ENCODERS, name, "encoder").Config.model_fields.items():
        if field.annotation is bool:
            found += [{key: value} for value in (False, True)]
        elif get_origin(field.annotation) is Literal and key != "name":
            found += [{key: value} for value in get_args(field.annotation)]
        elif NoneType in get_args(field.annotation):
            found += [{key: 1 if "int" in repr(field.annotation) else 0.5}]
    return found


VARIANTS = [{"name": name, **choice} for name in registry.ENCODERS for choice in options(name)]
SEEING = [v for v in VARIANTS if v["name"] != "dssm"]  # that one sees no actions


def label(variant):
    return " ".join(f"{value}" if key == "name" else f"{key}={value}" for key, value in variant.items())


def config(encoder, task="next_item"):
    return run_config(encoder=encoder, task=task, model={"dim": DIM})


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_an_encoder_says_whether_it_is_causal(variant):
    encoder = randomise(config(variant, "cloze").model.encoder.build(DIM, 12)).eval()
    where = layout(LENGTHS)
    x = torch.randn(where.rows, DIM, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[4] = x[4].flip(0)  # the last of the first five rows
    earlier = (encoder(x, where) - encoder(changed, where))[:4].abs().amax()
    assert (earlier == 0) == encoder.causal, f"rows before the changed one moved by {earlier}"


def test_the_options_that_break_causality_are_known():
    breaking = {label(v) for v in VARIANTS if not config(v, "cloze").model.encoder.build(DIM, 12).causal}
    assert breaking == {"sasrec causal=False", "transformer causal=False"}


@pytest.mark.parametrize("variant", SEEING, ids=label)
@pytest.mark.parametrize("task", registry.TASKS)
def test_no_query_depends_on_its_target(task, variant):
    """Or the pair is refused: a task that shows its targets to a causal encoder alone needs one."""
    settings = config(variant, task)
    if settings.model.task.component().needs_causal and variant.get("causal") is False:
        with pytest.raises(UserError) as refusal:
            settings.model.build(settings, CATALOGUE)
        for key in (f"model.task {task}", "model.encoder.causal=true", "model.task=cloze"):
            assert key in str(refusal.value)
        return
    model = randomise(settings.model.build(settings, CATALOGUE)).eval()
    b = batch(LENGTHS)
    b = with_items(b, torch.arange(b.actions))  # an item tells which action it is
    queries, targets = encoded(model, b)
    assert len(targets)
    for s, target in enumerate(targets):
        other = b.items_T.clone()
        other[target] = b.actions + s
        moved = (encoded(model, with_items(b, other))[0][s] - queries[s]).abs().amax()
        assert moved == 0, f"the query for action {target} sees it"


def with_items(b, items_T):
    return dataclasses.replace(b, columns={**b.columns, "item": items_T})


def encoded(model, b):
    part = model.supervise(b, key=5)
    context = StepContext(0, views={name: table.view([b.items_T]) for name, table in model.tables.items()})
    with torch.no_grad():
        vectors_TD = context.views["items"].lookup(part.rows_T(model.task.masks))
        states = model.encoder(model.input(part.tokens_T, part.layout, vectors_TD), part.layout)
    return part.select(states), part.targets_S.tolist()
