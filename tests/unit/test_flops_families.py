"""Operations of every kind of model, counted from it and the lengths, against torch's counter of the same step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gr import config as configs
from gr.models import encoder as encoders, hstu
from gr.models.step import StepContext
from gr.processes import Processes
from gr.scaling.families import ModelAccounting
from gr.scaling.flops import ATTENTION_BACKWARD
from tests.unit import (
    test_models_histories as histories,
    test_models_interleaved as interleaved,
    test_models_ranking as ranking,
    test_models_two_tower as two_tower,
)
from tests.unit.models_common import batch

LENGTHS = (9, 9, 9)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The kernels' work in products that torch's counter knows, of sequences that are equally long."""

    def attention(q, k, v, layout, *, scale, **unused):
        q, k, v = (x.unflatten(0, (len(layout.lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.transpose(-1, -2) * scale).sigmoid() @ v).transpose(1, 2).flatten(0, 1)

    monkeypatch.setattr(hstu, "attention", attention)
    monkeypatch.setattr(encoders, "attention", attention)
    monkeypatch.setattr(
        hstu,
        "norm_linear_silu_parts",
        lambda x, w, widths, **unused: F.silu(F.linear(F.layer_norm(x, x.shape[-1:]), w)).split(
            widths, dim=-1
        ),
    )
    # which CPU kernels are that torch's counter doesn't know
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **unused: (q @ k.transpose(-1, -2)).softmax(-1) @ v
    )
    monkeypatch.setattr(hstu, "gated_output", lambda o, u, x, w, b, **unused: x + F.linear(u * o, w, b))


def counted(model, given):
    """(forward, backward) of a step as torch counts it."""
    part, context = model.supervise(model.prepare(given), 5), StepContext(5)
    context = dataclasses.replace(context, views=model.views([part], context))
    with FlopCounterMode(display=False) as counter:
        loss = model(part, context)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def check(model, config, given, *, causal=True, leave_out=("embedding", "cross")):
    """leave_out: what torch's counter doesn't know, a scale and a sum a number, and matrices by vectors."""
    forward, backward = counted(model, given)
    parts = dict(ModelAccounting(model, config).step(given.lengths).parts)
    parts = {name: part for name, part in parts.items() if name not in leave_out}
    masked = parts["attention"].forward if "attention" in parts else 0.0
    again = (ATTENTION_BACKWARD - 2) * masked  # q . k once more, which plain products don't form
    if causal:  # plain products form the other half of the pairs, too
        again, masked_twice = again - 2 * masked, masked
    else:
        masked_twice = 0.0
    assert forward == pytest.approx(sum(p.forward for p in parts.values()) + masked_twice, rel=0.02)
    assert backward == pytest.approx(sum(p.backward for p in parts.values()) - again, rel=0.02)


def retrieval(encoder, **more):
    raw = {
        "data": {"path": "none", "max_length": 12},
        "model": {"dim": 16, "encoder": encoder, **more},
        "objective": "full_softmax",
        "optimizer": {"name": "adamw", "lr": 0.01},
    }
    config = configs.from_dict(raw)

    class Catalogue:
        rows, manifest, column_names = 40, None, ()

    return config, config.model.build(config, Catalogue(), Processes(torch.device("cpu")))


ENCODERS = {
    "hstu": {"name": "hstu", "layers": 2, "heads": 2, "qk_dim": 8, "v_dim": 8, "relative_time": False},
    "transformer": {"name": "transformer", "layers": 2, "heads": 2},
    "sasrec": {"name": "sasrec", "layers": 2, "ffn": 24},
    "pooled": {"name": "pooled", "layers": 2, "hidden": 24},
    "sasrec_plus": {"name": "sasrec", "layers": 2, "ffn": 24, "affine_norms": True, "final_norm": True},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_retrieval(name):
    config, model = retrieval(ENCODERS[name])
    # the loss is formed in chunks by an operator of its own, of which tests/unit/test_flops.py has the count
    check(model, config, batch(LENGTHS), leave_out=("embedding", "loss"))


def test_bert4rec_sees_everything_and_predicts_what_is_hidden():
    encoder = {"name": "transformer", "layers": 2, "heads": 2, "norm": "post", "causal": False}
    config, model = retrieval(encoder, task={"name": "cloze", "mask_probability": 0.25})
    check(model, config, batch(LENGTHS), causal=False, leave_out=("embedding", "loss"))
    found = ModelAccounting(model, config).step(LENGTHS)
    assert found.parts["loss"].forward == 2 * 0.25 * sum(LENGTHS) * 40 * 16
    assert found.parts["linear"].forward == 2 * sum(LENGTHS) * sum(
        p.numel() for p in model.encoder.parameters() if p.dim() == 2
    )


def test_gru4rec_as_cells_written_plainly():
    config, model = retrieval({"name": "gru4rec", "layers": 2, "hidden": 24})
    gru, n = model.encoder.gru, LENGTHS[0] - 1
    with FlopCounterMode(display=False) as counter:
        x_BD, total = torch.randn(3, 16, requires_grad=True), 0.0
        rows = [x_BD] * n
        for layer in range(2):
            hidden, out = torch.zeros(3, 24, requires_grad=True), []
            for row in rows:
                gates = F.linear(row, getattr(gru, f"weight_ih_l{layer}")) + F.linear(
                    hidden, getattr(gru, f"weight_hh_l{layer}")
                )
                hidden = gates[:, :24].sigmoid() * gates[:, 24:48] + gates[:, 48:]
                out.append(hidden)
            rows = out
        total = sum(model.encoder.output(row).sum() for row in rows)
        total.backward()
    found = ModelAccounting(model, config).step(LENGTHS).parts["linear"]
    assert counter.get_total_flops() == pytest.approx(found.forward + found.backward, rel=0.02)


@pytest.mark.parametrize("actions", ["summed", "interleaved"])
@pytest.mark.parametrize("encoder", ["hstu", "transformer"])
def test_ranking(actions, encoder):
    if actions == "interleaved":
        sections = {"dim": 16, "actions": "interleaved", "context": ["degree"], "encoder": ENCODERS[encoder]}
        config = interleaved.run_config(
            "hstu", model={"input": {"features": interleaved.FEATURES}, **sections}
        )
        model = config.model.build(config, interleaved.CATALOGUE, Processes(torch.device("cpu")))
        given = interleaved.shown(LENGTHS)
    else:
        config = ranking.run_config("hstu", model={"dim": 16, "encoder": ENCODERS[encoder]})
        model = config.model.build(config, ranking.CATALOGUE, Processes(torch.device("cpu")))
        given = ranking.labelled(LENGTHS, 0)
    check(model, config, given)


@pytest.mark.parametrize("name", histories.MODELS)
def test_models_of_pairs(name):
    model = histories.build(name)
    config = configs.from_dict(
        {
            "data": {"path": "none"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "model": {**histories.MODELS[name], "dim": 8, "tasks": histories.TASKS},
        }
    )
    check(model, config, histories.shown((6, 0, 1, 4)))


@pytest.mark.parametrize("name", two_tower.SMALL)
def test_two_towers(name):
    model, config = two_tower.build(name), two_tower.run_config(name)
    given = two_tower.batch(64)
    given = given.with_columns(label=torch.ones_like(given.columns["label"]))
    if name == "lr":
        assert (
            ModelAccounting(model, config).step(given.lengths).forward == 2 * 64
        )  # a weight for the one number
        return
    check(model, config, given)
