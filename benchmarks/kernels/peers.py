"""What HSTU's attention is measured against: attentions that others made, and the padded way of public HSTU code.

The softmax peers compute softmax(q . k / sqrt(D)), as many products as HSTU's SiLU attention: their figures are the
yardstick of what the hardware allows. Where a peer takes padded tensors only, moving rows there and back is timed.

B sequences, T rows in the batch, N longest sequence, H heads, D width of a head.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import padding
from benchmarks.kernels.memory import available_bytes
from benchmarks.kernels.problem import Case, Step, Way
from benchmarks.kernels.shapes import AttentionSpec

LOGARITHM = 1e-2  # see Way.slack: a float32 logarithm puts times at a border into the next bucket
LOGARITHM_NOTE = "buckets by a float32 logarithm: gate wider by 1e-2"
BUCKET_WIDTH, BUCKETS = 0.301, 129


def attention() -> list[Way]:
    padded = "pad and unpad counted where jagged"
    return [
        Way("eager", _eager, too_large, slack=LOGARITHM, note=LOGARITHM_NOTE),
        Way("compiled", _compiled, too_large, slack=LOGARITHM, note=LOGARITHM_NOTE),
        Way(
            "sdpa-flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION), _no_bias, answer="softmax", note=padded
        ),
        Way(
            "cudnn", partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _cuda_no_bias, answer="softmax", note=padded
        ),
        Way(
            "sdpa-stored-bias",
            _sdpa_stored_bias,
            _cuda_with_bias,
            answer="softmax",
            slack=LOGARITHM,
            note="memory-efficient backend; making the (B, N, N) bias, and its tables' gradients, not counted",
        ),
        Way("varlen", _varlen, _varlen_obstacle, answer="softmax", note="torch.nn.attention.varlen, jagged"),
        Way(
            "flex", _flex, _flex_obstacle, answer="softmax", slack=LOGARITHM, note="compiled; mask not timed"
        ),
        Way("flash-attn", _flash_attn, _flash_attn_obstacle, answer="softmax", note="the package, jagged"),
    ]


# The padded way


def padded_attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    bias_BNN: Tensor | None,
    scale: float,
    divisor: float,
) -> Tensor:
    """HSTU's attention as public code writes it: (B, N, H, D)."""
    N = q_BNHD.shape[1]
    scores_BHNN = torch.einsum("bnhd,bmhd->bhnm", q_BNHD, k_BNHD) * scale
    if bias_BNN is not None:
        scores_BHNN = scores_BHNN + bias_BNN[:, None].to(scores_BHNN.dtype)
    causal_NN = torch.ones(N, N, dtype=scores_BHNN.dtype, device=q_BNHD.device).tril()
    weights_BHNN = F.silu(scores_BHNN) / divisor * causal_NN
    return torch.einsum("bhnm,bmhd->bnhd", weights_BHNN, v_BNHD)


def padded_bias(
    position_N: Tensor | None, time_K: Tensor | None, query_times_BN: Tensor, key_times_BN: Tensor
) -> Tensor | None:
    """(B or 1, N, N): a logarithm and a look-up for every (query, key); None without tables."""
    if position_N is None:
        return None
    N = query_times_BN.shape[1]
    rows_N = torch.arange(N, device=query_times_BN.device)
    distance_NN = (rows_N[:, None] - rows_N).clamp_min(0)
    bias_BNN = position_N.index_select(0, distance_NN.flatten()).view(1, N, N)
    if time_K is not None:
        gap_BNN = (query_times_BN[:, :, None] - key_times_BN[:, None, :]).abs().clamp_min(1)
        bucket_BNN = (gap_BNN.float().log() / BUCKET_WIDTH).long().clamp_max(BUCKETS - 1)
        bias_BNN = bias_BNN + time_K.index_select(0, bucket_BNN.flatten()).view_as(bucket_BNN)
    return bias_BNN


def eager(case: Case) -> Tensor:
    """(T, H, D): padded, computed, unpadded."""
    spec, fixed, leaves = _spec(case), case.fixed, case.leaves
    to_pad = [leaves["q"], leaves["k"], leaves["v"], fixed["query_times"], fixed["key_times"]]
    q, k, v, query_times, key_times = (padding.pad(x, fixed["index"], spec.B, spec.N) for x in to_pad)
    bias = padded_bias(leaves.get("position"), leaves.get("time"), query_times, key_times)
    out = padded_attention(q, k, v, bias, spec.D**-0.5, float(spec.N))
    return padding.unpad(out, fixed["index"])


def _eager(case: Case) -> Step:
    return Step(lambda: eager(case), case.leaves)


def _compiled(case: Case) -> Step:
    return Step(compiled(partial(eager, case)), case.leaves)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one shape; forgets earlier shapes, so that no limit of recompilations is met."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def too_large(case: Case) -> str:
    spec = _spec(case)
    needed = 6 * spec.B * spec.H * spec.N**2 * getattr(torch, spec.dtype).itemsize
    if needed > available_bytes(case.device):
        return f"(B, H, N, N) tensors take about {needed / 2**30:,.0f} GiB"
    return ""


# Attentions that others made


def _sdpa(backend: SDPBackend, case: Case) -> Step:
    spec, index = _spec(case), case.fixed["index"]
    leaves = {name: case.leaves[name] for name in "qkv"}

    def forward() -> Tensor:
        q, k, v = (padding.pad(x, index, spec.B, spec.N).transpose(1, 2) for x in leaves.values())
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return padding.unpad(out.transpose(1, 2), index)

    return Step(forward, leaves)


def _sdpa_stored_bias(case: Case) -> Step:
    spec, fixed = _spec(case), case.fixed
    times = (padding.pad(fixed[x], fixed["index"], spec.B, spec.N) for x in ("query_times", "key_times"))
    with torch.no_grad():
        bias = padded_bias(case.leaves.get("position"), case.leaves.get("time"), *times)
        assert bias is not None
        hidden = torch.ones(spec.N, spec.N, dtype=torch.bool, device=case.device).triu(1)
        bias = bias.to(case.upstream.dtype).masked_fill(hidden, float("-inf"))[:, None]
    leaves = {**{name: case.leaves[name] for name in "qkv"}, "stored bias": bias.requires_grad_()}

    def forward() -> Tensor:
        q, k, v = (padding.pad(case.leaves[x], fixed["index"], spec.B, spec.N).transpose(1, 2) for x in "qkv")
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            mask = leaves["stored bias"].expand(spec.B, spec.H, -1, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return padding.unpad(out.transpose(1, 2), fixed["index"])

    return Step(forward, leaves)


def _varlen(case: Case) -> Step:
    varlen_attn: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    causal = _causal_argument(varlen_attn)
    return _packed(case, lambda q, k, v, cu, n: varlen_attn(q, k, v, cu, cu, n, n, **causal))


def _flash_attn(case: Case) -> Step:
    name = next(filter(_installed, ("flash_attn_interface", "flash_attn")))
    function: Any = importlib.import_module(name).flash_attn_varlen_func

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, n: int) -> Tensor:
        out = function(q, k, v, cu, cu, n, n, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return _packed(case, call)


def _packed(case: Case, attention: Callable[..., Any]) -> Step:
    leaves = {name: case.leaves[name] for name in "qkv"}
    cu, longest = case.fixed["offsets32"], _spec(case).N
    return Step(lambda: attention(*leaves.values(), cu, longest), leaves)


def _causal_argument(function: Callable[..., Any]) -> dict[str, Any]:
    """How this torch's varlen_attn is told to be causal."""
    names = inspect.signature(function).parameters
    return {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}


def _flex(case: Case) -> Step:
    """All rows end to end as one sequence; a row sees earlier rows of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec, fixed, T = _spec(case), case.fixed, case.tokens
    sequence_T = torch.repeat_interleave(
        torch.arange(spec.B, device=case.device), fixed["offsets"].diff(), output_size=T
    )
    query_times, key_times = fixed["query_times"], fixed["key_times"]
    position, time = case.leaves.get("position"), case.leaves.get("time")

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (sequence_T[i] == sequence_T[j]) & (i >= j)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if position is not None:
            score = score + position[(i - j).clamp(0, spec.N - 1)]
        if time is not None:
            gap = (query_times[i] - key_times[j]).abs().clamp_min(1).float()
            score = score + time[(gap.log() / BUCKET_WIDTH).long().clamp_max(BUCKETS - 1)]
        return score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block_mask = create_block_mask(mask, None, None, T, T, device=str(case.device), _compile=True)
    attend: Any = compiled(flex_attention)

    def forward() -> Tensor:
        q, k, v = (case.leaves[x].transpose(0, 1)[None] for x in "qkv")
        out = attend(q, k, v, score_mod=add_bias if position is not None else None, block_mask=block_mask)
        return out[0].transpose(0, 1)

    return Step(forward, case.leaves)


# What is in their way


def _no_bias(case: Case) -> str:
    return "it takes no bias with gradients" if "position" in case.leaves else ""


def _cuda_no_bias(case: Case) -> str:
    return "for CUDA" if case.device.type != "cuda" else _no_bias(case)


def _cuda_with_bias(case: Case) -> str:
    if case.device.type != "cuda":
        return "its backward pass with a bias is for CUDA"
    return "" if "position" in case.leaves else "there is no bias to store"


def _varlen_obstacle(case: Case) -> str:
    if not _installed("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return _cuda_no_bias(case)


def _flash_attn_obstacle(case: Case) -> str:
    if not (_installed("flash_attn_interface") or _installed("flash_attn")):
        return "the flash-attn package isn't installed"
    return _cuda_no_bias(case)


def _flex_obstacle(case: Case) -> str:
    return "no backward pass on CPU" if case.device.type != "cuda" else ""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _spec(case: Case) -> AttentionSpec:
    assert isinstance(case.spec, AttentionSpec)
    return case.spec
