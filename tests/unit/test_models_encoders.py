"""Encoders against torch's own padded or one-by-one modules, and what all encoders promise."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gr.errors import UserError
from gr.models.gru4rec import GRU4Rec
from gr.models.hstu import HSTU
from gr.models.pooled import Pooled, mean_so_far
from gr.models.sasrec import SASRec
from gr.models.transformer import Transformer
from tests.precision import tolerance
from tests.unit.models_common import LENGTHS, generator, gradients, layout, parts, randomise

DIM = 8
CONFIGS = {
    "hstu": HSTU.Config(heads=2, qk_dim=3, v_dim=4),
    "hstu softmax": HSTU.Config(heads=2, qk_dim=3, v_dim=4, activation="softmax", relative_time=False),
    "sasrec": SASRec.Config(heads=2, ffn=12),
    "sasrec classical": SASRec.Config(heads=1, ffn=8, affine_norms=True, final_norm=True),
    "transformer": Transformer.Config(heads=2),
    "bert4rec": Transformer.Config(heads=2, causal=False, norm="post", input_norm=True),
    "gru4rec": GRU4Rec.Config(layers=2, hidden=5),
    "gru4rec same width": GRU4Rec.Config(hidden=DIM),
    "pooled": Pooled.Config(hidden=6),
}


def build(config, dtype=torch.float32):
    encoder = config.build(DIM, 12)
    return randomise(encoder).to(dtype).eval()


def inputs(where, dtype=torch.float32):
    return torch.randn(where.rows, DIM, generator=generator(4), dtype=torch.float64).to(dtype)


# Encoders of one or two blocks: some ten sums of up to 24 terms, forward, and as many backward, each of which may
# have terms a hundred times its result (parameters are of half unit scale, norms divide by small deviations).
CHAIN = {"terms": 24, "stages": 20, "size": 100.0}
EXACT = tolerance(**CHAIN, dtype=torch.float64)
ROUGH = tolerance(**CHAIN)


def compare(actual, expected, x, pairs):
    """Outputs, and gradients of the input and of pairs of parameters, under a random weighting."""
    torch.testing.assert_close(actual, expected, **EXACT)
    weights = torch.randn(actual.shape, generator=generator(6), dtype=actual.dtype)
    ours = gradients((actual * weights).sum(), x, *[a for a, _ in pairs])
    theirs = gradients((expected * weights).sum(), x, *[e for _, e in pairs])
    for a, e in zip(ours, theirs):
        torch.testing.assert_close(a, e.reshape(a.shape), **EXACT)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_sasrec_equals_multihead_attention_and_convolutions(affine, causal):
    config = SASRec.Config(layers=1, heads=2, ffn=12, affine_norms=affine, final_norm=affine, causal=causal)
    model = build(config, torch.float64)
    block = model.blocks[0]
    attention = nn.MultiheadAttention(DIM, 2, batch_first=True, dtype=torch.float64)
    up, down = nn.Conv1d(DIM, 12, 1, dtype=torch.float64), nn.Conv1d(12, DIM, 1, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
    pairs = [
        (block.output.weight, attention.out_proj.weight),
        (block.output.bias, attention.out_proj.bias),
        (block.ffn.up.weight, up.weight),
        (block.ffn.up.bias, up.bias),
        (block.ffn.down.weight, down.weight),
        (block.ffn.down.bias, down.bias),
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours.reshape(theirs.shape))

    def norm(x, ours):
        return F.layer_norm(x, (DIM,), ours.weight, ours.bias, eps=1e-8)

    def expected_one(x_ND):
        if not len(x_ND):
            return x_ND
        hidden = torch.ones(len(x_ND), len(x_ND), dtype=torch.bool).triu(1) if causal else None
        query = norm(x_ND, block.attention_norm)
        attended = attention(query[None], x_ND[None], x_ND[None], attn_mask=hidden)[0][0]
        z = norm(query + attended, block.ffn_norm)
        z = z + down(F.relu(up(z.T))).T
        return norm(z, model.final_norm) if affine else z

    where = layout()
    x = inputs(where, torch.float64).requires_grad_()
    compare(model(x, where), torch.cat([expected_one(s) for s in parts(x, LENGTHS)]), x, pairs)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("causal", [False, True])
def test_transformer_equals_torchs(norm, causal):
    config = Transformer.Config(
        layers=1, heads=2, ffn=20, norm=norm, causal=causal, input_norm=norm == "post"
    )
    model = build(config, torch.float64)
    block = model.blocks[0]
    theirs = nn.TransformerEncoderLayer(
        DIM, 2, 20, 0.0, "gelu", 1e-12, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    pairs = [
        (block.qkv.weight, theirs.self_attn.in_proj_weight),
        (block.qkv.bias, theirs.self_attn.in_proj_bias),
        (block.output.weight, theirs.self_attn.out_proj.weight),
        (block.output.bias, theirs.self_attn.out_proj.bias),
        (block.ffn.up.weight, theirs.linear1.weight),
        (block.ffn.up.bias, theirs.linear1.bias),
        (block.ffn.down.weight, theirs.linear2.weight),
        (block.ffn.down.bias, theirs.linear2.bias),
        (block.attention_norm.weight, theirs.norm1.weight),
        (block.attention_norm.bias, theirs.norm1.bias),
        (block.ffn_norm.weight, theirs.norm2.weight),
        (block.ffn_norm.bias, theirs.norm2.bias),
    ]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)

    def expected_one(x_ND):
        if not len(x_ND):
            return x_ND
        hidden = torch.ones(len(x_ND), len(x_ND), dtype=torch.bool).triu(1) if causal else None
        x_ND = model.input_norm(x_ND) if model.input_norm is not None else x_ND
        x_ND = theirs(x_ND[None], src_mask=hidden)[0]
        return model.final_norm(x_ND) if norm == "pre" else x_ND

    where = layout()
    x = inputs(where, torch.float64).requires_grad_()
    compare(model(x, where), torch.cat([expected_one(s) for s in parts(x, LENGTHS)]), x, pairs)


def test_the_inner_dropout_of_the_feed_forward_layer_is_apart_when_told():
    x = torch.randn(50, DIM, generator=generator(4))

    def ffn(**config):
        encoder = randomise(Transformer(Transformer.Config(dropout=0.5, **config), DIM, 12))
        return encoder.blocks[0].ffn

    apart = ffn(ffn_dropout=0.0)
    kept = apart(x, 1)
    assert torch.equal(kept[kept != 0], 2 * apart.eval()(x, 1)[kept != 0])
    assert 0.3 < (kept == 0).float().mean() < 0.7
    both = ffn()
    kept = both(x, 1)
    assert not torch.allclose(kept[kept != 0], 2 * both.eval()(x, 1)[kept != 0])


def test_gru_equals_one_sequence_at_a_time():
    model = build(CONFIGS["gru4rec"], torch.float64)
    where = layout()
    x = inputs(where, torch.float64).requires_grad_()
    expected = torch.cat([model.output(model.gru(s)[0]) if len(s) else s for s in parts(x, LENGTHS)])
    pairs = [(p, p) for p in model.parameters()]
    compare(model(x, where), expected, x, pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_does_not_depend_on_companions(name):
    model, where = build(CONFIGS[name]), layout()
    x = inputs(where)
    together = model(x, where)
    for b, (first, stop) in enumerate(zip(where.offsets_B1.tolist(), where.offsets_B1[1:].tolist())):
        alone = dataclasses.replace(
            layout((LENGTHS[b],)),
            query_times_T=where.query_times_T[first:stop],
            key_times_T=where.key_times_T[first:stop],
        )
        torch.testing.assert_close(model(x[first:stop], alone), together[first:stop], **ROUGH)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_seen_by_the_rows_it_may_reach_alone(name):
    model, where = build(CONFIGS[name]), layout()
    x = inputs(where)
    changed = x.clone()
    changed[3] = x[3].flip(0)  # row 3 of the first sequence, which has 9; a shift would be normed away
    moved = (model(x, where) - model(changed, where)).abs().amax(dim=1) > 1e-7
    causal = name != "bert4rec"
    assert moved[3:9].all()
    assert not moved[9:].any()
    assert moved[:3].all() != causal
    assert moved[:3].any() != causal


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1)])
def test_empty_and_single_sequences(name, lengths):
    model, where = build(CONFIGS[name]), layout(lengths)
    out = model(inputs(where), where)
    assert out.shape == (sum(lengths), DIM)
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_autocast_stays_close(name):
    model, where = build(CONFIGS[name]), layout()
    x = inputs(where).requires_grad_()
    exact = model(x, where)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, where)
    assert (rough - exact).norm() / exact.norm() < 0.05
    rough.float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("config", [SASRec.Config(heads=3), Transformer.Config(heads=3)])
def test_heads_that_do_not_divide_the_width_are_refused(config):
    with pytest.raises(UserError, match=r"model\.dim=8 cannot be shared by 3 heads"):
        build(config)


def test_pooled_is_layers_on_the_mean_of_the_rows_so_far():
    where = layout()
    model = build(CONFIGS["pooled"], torch.float64)
    x_TD = inputs(where, torch.float64).requires_grad_()
    means = [
        sequence.cumsum(0) / torch.arange(1, len(sequence) + 1, dtype=torch.float64)[:, None]
        for sequence in x_TD.split(list(where.lengths))
    ]
    expected = torch.cat(means)
    torch.testing.assert_close(mean_so_far(x_TD, where), expected, **EXACT)
    for layer in model.layers:
        expected = F.relu(F.linear(expected, layer.weight, layer.bias))
    expected = F.linear(expected, model.output.weight, model.output.bias)
    compare(model(x_TD, where), expected, x_TD, [(p, p) for p in model.parameters()])


def test_a_mean_has_the_same_bits_in_any_company_and_no_ones_nan():
    where = layout((3, 40, 17))
    x_TD = inputs(where)
    alone = mean_so_far(x_TD[43:], layout((17,)))
    x_TD[:43] = torch.nan
    assert torch.equal(mean_so_far(x_TD, where)[43:], alone)
