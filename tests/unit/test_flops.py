"""Operations counted of a step: against torch's counter on plain padded tensors, and the benchmarks' own formulas."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import hstu_attention as measured
from benchmarks.kernels.shapes import AttentionSpec
from gr import config as configs
from gr.errors import UserError
from gr.models import encoder as encoders, hstu
from gr.models.layout import JaggedLayout
from gr.scaling.flops import ATTENTION_BACKWARD, Accounting, attention

B, N, ITEMS = 3, 24, 500
FAMILIES = {
    "hstu": {"layers": 3, "heads": 2, "qk_dim": 16, "v_dim": 24, "relative_time": False},
    "transformer": {"layers": 2, "heads": 4, "ffn": 96},
    "sasrec": {"layers": 2, "heads": 2, "ffn": 48},
}


def config(encoder: dict, *overrides: str, objective: str = "sampled_softmax"):
    raw = {
        "data": {"path": "none", "max_length": N},
        "model": {"dim": 32, "encoder": encoder},
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": 0.01},
    }
    return configs.override(configs.from_dict(raw), overrides)


def plain_attention(q, k, v, layout, *, scale, **unused):
    """Padded, every pair of a sequence formed; all sequences are of length N here."""
    q, k, v = (x.unflatten(0, (B, N)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * scale).sigmoid()
    return (weights @ v).transpose(1, 2).flatten(0, 1)


def plain_parts(x, weight, widths, **unused):
    return F.silu(F.linear(F.layer_norm(x, x.shape[-1:]), weight)).split(widths, dim=-1)


def plain_output(attended, u, x, weight, bias, **unused):
    return x + F.linear(u * attended, weight, bias)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_is_counted_as_torch_counts_it(name, recompute, monkeypatch):
    monkeypatch.setattr(hstu, "attention", plain_attention)
    monkeypatch.setattr(encoders, "attention", plain_attention)
    monkeypatch.setattr(hstu, "norm_linear_silu_parts", plain_parts)
    monkeypatch.setattr(hstu, "gated_output", plain_output)
    run = config({"name": name, **FAMILIES[name]}, f"train.activation_checkpointing={str(recompute).lower()}")
    encoder = run.model.encoder.build(run.model.dim, N)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for stack in (m for m in encoder.modules() if hasattr(m, "recompute")):
        stack.recompute = recompute
    layout = JaggedLayout(torch.arange(0, B * N + 1, N), (N,) * B, N)
    x_TD = torch.randn(B * N, run.model.dim, requires_grad=True)
    candidates_TKD = torch.randn(B * N, 1 + run.objective.negatives, run.model.dim, requires_grad=True)
    # torch leaves out of the second forward pass what comes behind the last value that is needed; we count it
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        loss = (candidates_TKD @ encoder(x_TD, layout)[:, :, None]).logsumexp(1).sum()
        forward = counter.get_total_flops()
        loss.backward()
    accounting = Accounting(run, ITEMS)
    found = accounting.step([N] * B)
    # a padded product forms the pairs that the mask takes away too, and the plain backward pass forms none again
    masked = found.parts["attention"].forward
    assert forward == pytest.approx(found.forward + masked, rel=0.02)
    backward = found.backward - ATTENTION_BACKWARD * masked + (5 if recompute else 4) * masked
    assert counter.get_total_flops() - forward == pytest.approx(backward, rel=0.02)
    assert accounting.parameters == sum(p.numel() for p in encoder.parameters())


def test_attention_is_counted_as_its_benchmark_counts_it():
    spec = AttentionSpec("uniform", B=5, N=40, H=2, D=24, bias="none", dtype="float32")
    work = measured.build(spec, torch.device("cpu")).work
    squares = float((spec.draw().astype(np.float64) ** 2).sum())
    found = attention(squares, spec.H * 2 * spec.D, causal=True)
    assert (found.forward, found.backward) == (work.flops_forward, work.flops_backward)
    assert attention(squares, spec.H * 2 * spec.D, causal=False).forward == 2 * found.forward


def test_lengths_and_losses_are_what_they_are():
    run = config({"name": "hstu", **FAMILIES["hstu"]})
    one, other = Accounting(run, ITEMS).step([5, 0, 9]), Accounting(run, ITEMS).step([7, 7])
    assert one.parts["linear"] == other.parts["linear"] and one.parts["loss"] == other.parts["loss"]
    assert one.parts["attention"].forward / other.parts["attention"].forward == (25 + 81) / 98
    assert Accounting(run, ITEMS).step([]).total == 0
    assert one.parts["loss"].forward == 2 * 14 * (1 + run.objective.negatives) * 32
    for objective, scored in (("full_softmax", ITEMS), ("in_batch", 14), ("bce", 2)):
        found = Accounting(config({"name": "hstu"}, objective=objective), ITEMS).step([5, 9])
        assert found.parts["loss"].forward == 2 * 14 * scored * 32
    assert Accounting(run, ITEMS).step([5, 9], targets=3).parts["loss"].forward == 2 * 3 * 129 * 32


def test_a_recurrent_encoder_has_weights_alone_and_a_ranking_model_is_refused():
    found = Accounting(config({"name": "gru4rec", "hidden": 48}), ITEMS)
    assert found.encoder.weights == 3 * 48 * (32 + 48) + 48 * 32 and found.encoder.widths == 0
    ranking = SimpleNamespace(model=SimpleNamespace(name="ranking"), objective=None)
    with pytest.raises(UserError, match=r"counted of retrieval models alone, and model\.name is ranking"):
        Accounting(ranking, ITEMS)
