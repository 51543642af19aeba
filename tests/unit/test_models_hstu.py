"""HSTU against a plain N x N rewrite of its equations in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from gr.models.hstu import HSTU
from tests.precision import analysed, assert_within
from tests.unit.models_common import LENGTHS, generator, gradients, layout, named, parts, randomise

DIM, MAX_LENGTH = 7, 9
CONFIGS = {
    "full": HSTU.Config(layers=2, heads=2, qk_dim=3, v_dim=5, dropout=0.0),
    "fixed divisor": HSTU.Config(layers=1, heads=1, qk_dim=4, v_dim=4, dropout=0.0, divisor=5.0),
    "no time": HSTU.Config(layers=1, heads=3, qk_dim=2, v_dim=1, dropout=0.0, relative_time=False),
    "softmax, no bias": HSTU.Config(
        layers=2,
        heads=2,
        qk_dim=3,
        v_dim=5,
        dropout=0.0,
        activation="softmax",
        relative_position=False,
        relative_time=False,
    ),
}


def dense(config, p, x_TD, lengths, query_times_T, key_times_T):
    """The definition, one sequence and one head at a time."""
    out = []
    times = zip(parts(query_times_T, lengths), parts(key_times_T, lengths))
    for x_ND, (query_times_N, key_times_N) in zip(parts(x_TD, lengths), times):
        n = x_ND.shape[0]
        for layer in range(config.layers):
            name = f"layers.{layer}."
            uvqk = F.silu(F.layer_norm(x_ND, (DIM,), eps=1e-6) @ p[name + "uvqk.weight"].T)
            hv, hq = config.heads * config.v_dim, config.heads * config.qk_dim
            u, v, q, k = (
                uvqk[:, :hv],
                uvqk[:, hv : 2 * hv],
                uvqk[:, 2 * hv : 2 * hv + hq],
                uvqk[:, 2 * hv + hq :],
            )
            bias = torch.zeros(n, n, dtype=torch.float64)
            for i in range(n):
                for j in range(i + 1):
                    if config.relative_position:
                        bias[i, j] += p[name + "position_bias"][i - j]
                    if config.relative_time:
                        gap = max(abs(int(query_times_N[i] - key_times_N[j])), 1)
                        bias[i, j] += p[name + "time_bias"][min(math.floor(math.log(gap) / 0.301), 128)]
            causal = torch.ones(n, n, dtype=torch.bool).tril()
            heads = []
            for h in range(config.heads):
                q_h, k_h = (t[:, h * config.qk_dim : (h + 1) * config.qk_dim] for t in (q, k))
                if config.activation == "silu":
                    weights = F.silu(q_h @ k_h.T + bias) / (config.divisor or MAX_LENGTH + 11)
                    weights = weights * causal
                else:
                    logits = (q_h @ k_h.T / math.sqrt(config.qk_dim) + bias).masked_fill(~causal, -torch.inf)
                    weights = logits.softmax(dim=1) if n else logits
                heads.append(weights @ v[:, h * config.v_dim : (h + 1) * config.v_dim])
            o = F.layer_norm(torch.cat(heads, dim=1), (hv,), eps=1e-6)
            x_ND = x_ND + (u * o) @ p[name + "output.weight"].T + p[name + "output.bias"]
        out.append(x_ND)
    return torch.cat(out)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_its_equations(name, dtype):
    config = CONFIGS[name]
    model = randomise(HSTU(config, DIM, MAX_LENGTH)).to(dtype)
    where = layout()
    x = torch.randn(where.rows, DIM, generator=generator(), dtype=torch.float64)
    weights = torch.randn(where.rows, DIM, generator=generator(5), dtype=torch.float64)

    x_model = x.to(dtype).requires_grad_()
    actual = model(x_model, where)
    actual_grads = gradients((actual * weights).sum(), x_model, *named(model).values())

    def equations():
        copies = {n: p.detach().double().requires_grad_() for n, p in named(model).items()}
        x_dense = x_model.detach().double().requires_grad_()
        expected = dense(config, copies, x_dense, LENGTHS, where.query_times_T, where.key_times_T)
        expected_grads = gradients((expected * weights).sum(), x_dense, *copies.values())
        return {"out": expected.detach(), **dict(zip(["x", *copies], expected_grads))}

    exact, allowed = analysed(equations, dtype)
    found = {"out": actual.detach(), **dict(zip(["x", *named(model)], actual_grads))}
    assert_within(found, exact, allowed, dtype)


def test_dropout_is_on_the_gated_output_only_in_training():
    model = HSTU(HSTU.Config(layers=1, qk_dim=4, v_dim=4, dropout=0.5), DIM, MAX_LENGTH)
    randomise(model)
    where, x = layout(), torch.randn(sum(LENGTHS), DIM, generator=generator())
    assert not torch.equal(model(x, where), model(x, where))
    torch.manual_seed(3)
    first = model(x, where)
    torch.manual_seed(3)
    assert torch.equal(first, model(x, where))
    model.eval()
    assert torch.equal(model(x, where), model(x, where))
