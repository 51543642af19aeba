"""The attention in Triton: when it can run, and how it is launched.

Nothing here reads a device tensor on the host: grids come from max_length, and blocks past a sequence's end return.

B sequences, T query and S key rows in the batch, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gr_kernels.hstu_attention import tiles
from gr_kernels.hstu_attention.buckets import device_thresholds
from gr_kernels.hstu_attention.problem import Gradients, Problem, RelativeBias
from gr_kernels.hstu_attention.schema import Operators
from gr_kernels.hstu_attention.settings import Settings
from gr_kernels.triton_common.available import interpreting, on, why_unavailable, wrong_dtype
from gr_kernels.triton_common.sizes import power_of_two

WIDEST = 256
# Keys and values of the (sequence, head) pairs that run side by side should stay in the L2 cache (50 MB on an H100).
L2_SHARE = 24 * 2**20
# The table gradients are first summed by this many programs at most, and into this many bytes unless few programs
# would be left.
TABLE_PROGRAMS = 1024
TABLE_BYTES = 64 * 2**20
FEWEST_TABLE_PROGRAMS = 128


def obstacle(q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, problem: Problem) -> str:
    """Why this call can't be Triton's, "" when it can."""
    if reason := why_unavailable(q_THQ.device):
        return reason
    if reason := wrong_dtype(q_THQ.dtype):
        return reason
    widest = max(q_THQ.shape[-1], v_SHV.shape[-1])
    if widest > WIDEST:
        return f"heads are {widest} wide, more than {WIDEST}"
    for name, table in (("position", problem.bias.position), ("time", problem.bias.time)):
        if table is not None and (reason := wrong_dtype(table.dtype, f"bias.{name}")):
            return reason
    return ""


def _block(width: int) -> int:
    return max(16, power_of_two(width))


def _margin(per_unit: float, last: int) -> float:
    """How far a bucket number computed in float32 can be from the exact one, in buckets; see time_bucket.

    |dt| as float32 is at most 2^-23 off relatively, and so its logarithm 1.5 x 2^-23 absolutely. lg2.approx is 2^-22
    off, relatively outside (0.5, 2) and absolutely inside; sqrt.approx 2^-22 relatively; the product 2^-24, like its
    factor per_unit. With a number of at most `last` where it matters (above it is clipped), the sum is below
    (per_unit + last) 2^-21. Twice that, and never half a bucket.
    """
    return min(2.0**-20 * (per_unit + last + 1), 0.45)


@dataclass(frozen=True)
class Launch:
    """Everything the kernels of one call have in common."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem

    @functools.cached_property
    def sequences(self) -> int:
        return self.problem.offsets.shape[0] - 1

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Bounds of the rows of one sequence: its queries, its keys."""
        return min(self.problem.max_length, self.q.shape[0]), min(self.problem.max_length, self.k.shape[0])

    @functools.cached_property
    def query_offsets(self) -> Tensor:
        query_offsets = self.problem.query_offsets
        return self.problem.offsets if query_offsets is None else query_offsets

    @functools.cached_property
    def parts(self) -> Tensor | None:
        """(B, 3) int64, as load_sequence reads them."""
        part = self.problem.part
        if part is None:
            return None
        columns = (part.query_starts - part.key_starts, part.first_rows + part.key_starts, part.key_starts)
        return torch.stack(columns, dim=1)

    @functools.cached_property
    def weight_scale(self) -> float:
        problem = self.problem
        divisor = problem.divisor if problem.activation == "silu" else 1.0
        return (problem.keep_scale if problem.dropout else 1.0) / divisor

    @functools.cached_property
    def score_scale(self) -> float:
        """What sums of the kernels' ds are multiplied by to be sums of gradients of the scores."""
        return self.weight_scale if self.problem.activation == "silu" else 1.0

    @functools.cached_property
    def order(self) -> Tensor | None:
        """The caller's order of the sequences, else from the longest on, so that the last to start are short."""
        if self.sequences < 2:
            return None
        if self.problem.order is not None:
            return self.problem.order
        return self.problem.offsets.diff().argsort(descending=True, stable=True)

    @functools.cached_property
    def width(self) -> int:
        return max(_block(self.q.shape[2]), _block(self.v.shape[2]))

    @functools.cached_property
    def ragged(self) -> bool:
        return any(x.shape[2] != _block(x.shape[2]) for x in (self.q, self.v))

    @functools.cached_property
    def biased(self) -> bool:
        return self.problem.bias.position is not None or self.problem.bias.time is not None

    @functools.cached_property
    def atomic(self) -> bool:
        """Whether the backward that needn't be deterministic is another than that which is."""
        return tiles.atomic(self.width, self.biased)

    def tile(self, which: tiles.Pass) -> tiles.Tile:
        return tiles.choose(
            which,
            self.width,
            self.q.element_size(),
            max(self.longest),
            biased=self.biased,
            softmax=self.problem.activation == "softmax",
            dropout=self.problem.dropout > 0,
            ragged=self.ragged,
            interpreting=interpreting(),
        )

    def settings(self, tile: tiles.Tile, atomic: bool = False) -> Settings:
        problem = self.problem
        mask, bias = problem.mask, problem.bias
        return Settings(
            ROWS=tile.rows,
            KEYS=tile.keys,
            WIDTH_Q=self.q.shape[2],
            WIDTH_V=self.v.shape[2],
            BLOCK_Q=_block(self.q.shape[2]),
            BLOCK_V=_block(self.v.shape[2]),
            CAUSAL=mask.causal,
            TARGETS=mask.targets is not None,
            WINDOW=mask.window > 0,
            CONTEXTS=mask.contexts > 0,
            CROSS=problem.query_offsets is not None,
            PART=problem.part is not None,
            POSITION=bias.position is not None,
            TIME=bias.time is not None,
            SQRT=bias.time is not None and bias.buckets.kind == "sqrt",
            SOFTMAX=problem.activation == "softmax",
            DROPOUT=problem.dropout > 0,
            FAST=self.q.dtype != torch.float32 and not interpreting(),
            ORDERED=self.order is not None,
            ATOMIC=atomic,
        )

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments that are the same in every pass, by name."""
        problem = self.problem
        mask, bias = problem.mask, problem.bias
        timed = bias.time is not None
        last = bias.buckets.last()
        per_unit = (math.log(2) if bias.buckets.kind == "log" else 1.0) / bias.buckets.width
        longest = problem.max_length
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            **_strides(q=self.q, k=self.k, v=self.v),
            "offsets": problem.offsets,
            "query_offsets": problem.query_offsets,
            "targets": mask.targets,
            "parts": self.parts,
            "order": self.order,
            "position": bias.position,
            "time": bias.time,
            "query_times": bias.query_times if timed else None,
            "key_times": bias.key_times if timed else None,
            "thresholds": device_thresholds(bias.buckets, self.q.device) if timed else None,
            "sequences": self.sequences,
            "heads": self.q.shape[1],
            "rows": self.q.shape[0],
            # longer than the longest sequence is all the same
            "window": min(mask.window, longest),
            "full_rows": min(mask.full_rows, longest),
            "contexts": min(mask.contexts, longest + 1),
            "scale": problem.scale,
            "buckets_per_unit": per_unit,
            "bucket_margin": _margin(per_unit, last),
            "last_bucket": last,
            "key_low": problem.dropout_key & 0xFFFFFFFF,
            "key_high": problem.dropout_key >> 32,
            "drop_last": max(problem.drop_below - 1, 0),
            "keep_scale": problem.keep_scale if problem.dropout else 1.0,
            "weight_scale": self.weight_scale,
            "score_scale": self.score_scale * problem.scale,
        }

    def run(
        self, kernel: Any, settings: Settings, tile: tiles.Tile, programs: int, own: Mapping[str, Any]
    ) -> None:
        """Starts `programs` programs of a kernel with the common arguments that it takes and its own."""
        if programs == 0:
            return
        named = {**self.arguments, **own}
        arguments = {name: named[name] for name in kernel.arg_names if name != "S"}
        # d_out has the strides of out; what d_q is added up in has none (it is in the kernel's own order)
        of_rows = [x for name, x in arguments.items() if name == "d_out" or f"{name}_row" in arguments]
        settings = addressed(settings, *of_rows)
        kernel[(programs,)](**arguments, S=settings, num_warps=tile.warps, num_stages=tile.stages)

    def walk(self, blocks: int) -> dict[str, int]:
        """In which order the (sequence, head, block) pieces are taken; see work_item."""
        widths = _block(self.q.shape[2]) + _block(self.v.shape[2])
        bytes_of_pair = max(1, self.longest[1] * widths * self.q.element_size())
        pairs = max(1, self.sequences * self.q.shape[1])
        return {"blocks": blocks, "group": min(pairs, max(1, L2_SHARE // bytes_of_pair))}

    def pieces(self, blocks: int) -> int:
        return self.sequences * self.q.shape[1] * blocks


def addressed(settings: Settings, *tensors: Tensor) -> Settings:
    """The settings with what holds for the addresses in (rows, heads, width) tensors.

    Triton knows of a pointer whether 16 divides it, and of a stride whether 16 does (in numbers): a model of width 50
    would load number after number, each waited for. Two bfloat16 at a time are enough to load ahead of use.
    """
    bytes_of, reach = [16], [0]
    for x in tensors:
        row, head = (stride if size > 1 else 0 for stride, size in zip(x.stride()[:2], x.shape))
        bytes_of += [x.data_ptr(), row * x.element_size(), head * x.element_size()]
        reach += [max(settings.ROWS, settings.KEYS) * row, x.shape[1] * head]
    return replace(settings, ALIGNED=math.gcd(*bytes_of), FAR=max(reach) >= 2**31)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """name_row and name_head of each (rows, heads, width) tensor."""
    pairs = (((f"{n}_row", x.stride(0)), (f"{n}_head", x.stride(1))) for n, x in tensors.items())
    return dict(pair for both in pairs for pair in both)


def _narrow(x: Tensor) -> Tensor:
    """The kernels take any row and head stride, but neighbouring numbers must be neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Launch:
    return Launch(_narrow(q), _narrow(k), _narrow(v), _dense(problem))


def _dense(problem: Problem) -> Problem:
    """The vectors of a problem without gaps, and without the gradients that autograd follows."""

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().contiguous()

    bias, mask = problem.bias, problem.mask
    tables = {name: dense(getattr(bias, name)) for name in ("position", "time", "query_times", "key_times")}
    return replace(
        problem,
        offsets=problem.offsets.contiguous(),
        query_offsets=dense(problem.query_offsets),
        order=dense(problem.order),
        mask=replace(mask, targets=dense(mask.targets)),
        bias=RelativeBias(**tables, buckets=bias.buckets),
    )


def _zero_outside(x: Tensor, offsets: Tensor) -> None:
    """Zeros for the rows of a contiguous tensor that are in no sequence."""
    from gr_kernels.hstu_attention import triton_kernel

    rows, width = x.shape[0], x[0].numel() if x.shape[0] else 0
    if rows and width:
        grid = (-(-rows // 64),)
        triton_kernel.zero_outside_kernel[grid](x, offsets, offsets.shape[0] - 1, rows, width, num_warps=4)


def forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(out, lse): (T, H, V), and for softmax (H, T) float32, the log of each row's sum of exponentials."""
    from gr_kernels.hstu_attention import triton_kernel

    launch = _launch(q, k, v, problem)
    out, lse = v.new_empty((q.shape[0], *v.shape[1:])), None
    if problem.activation == "softmax":
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    tile = launch.tile("forward")
    blocks = -(-launch.longest[0] // tile.rows)
    own = {"out": out, "lse": lse, **_strides(out=out), **launch.walk(blocks)}
    with on(q):
        _zero_outside(out, launch.query_offsets)
        launch.run(triton_kernel.forward_kernel, launch.settings(tile), tile, launch.pieces(blocks), own)
    return out, lse


def backward(
    d_out: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
) -> Gradients:
    """Gradients of q, k, v, bias.position and bias.time (None where absent); out and lse are softmax's alone."""
    with on(q):
        return _backward(d_out, out, lse, q, k, v, problem)


def _backward(
    d_out: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
) -> Gradients:
    from gr_kernels.hstu_attention import triton_kernel

    launch = _launch(q, k, v, problem)
    d_out = d_out.contiguous()
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    given: dict[str, Any] = {"d_out": d_out, "lse": lse, "delta": None, **_strides(out=d_out)}
    if out is not None and lse is not None:
        given["delta"] = torch.empty_like(lse)
        _run_delta(launch, out, given)
    atomic = not problem.deterministic and launch.atomic
    if atomic:
        d_q_sums = torch.zeros(
            (q.shape[1], q.shape[0], _block(q.shape[2])), dtype=torch.float32, device=q.device
        )
        given["d_q"] = d_q_sums
    else:
        given |= {"d_q": d_q, **_strides(d_q=d_q)}
        tile = launch.tile("d_q")
        blocks = -(-launch.longest[0] // tile.rows)
        own = {**given, **launch.walk(blocks)}
        _zero_outside(d_q, launch.query_offsets)
        launch.run(triton_kernel.d_q_kernel, launch.settings(tile), tile, launch.pieces(blocks), own)
    tile = launch.tile("d_kv")
    blocks = -(-launch.longest[1] // tile.keys)
    own = {**given, "d_k": d_k, "d_v": d_v, **_strides(d_k=d_k, d_v=d_v), **launch.walk(blocks)}
    for x in (d_k, d_v):
        _zero_outside(x, launch.problem.offsets)
    launch.run(triton_kernel.d_kv_kernel, launch.settings(tile, atomic), tile, launch.pieces(blocks), own)
    if atomic:
        d_q_THQ = d_q_sums[..., : q.shape[2]].transpose(0, 1)
        torch.mul(d_q_THQ, launch.arguments["score_scale"], out=d_q)
    return d_q, d_k, d_v, *_table_gradients(launch, given)


def _run_delta(launch: Launch, out: Tensor, given: Mapping[str, Any]) -> None:
    from gr_kernels.hstu_attention import triton_kernel

    rows, heads, width = out.shape
    tile, block = launch.tile("forward"), _block(width)
    # only what the kernel looks at: it is the same for every mask and bias
    settings = Settings(
        ROWS=tile.rows,
        KEYS=tile.keys,
        WIDTH_Q=width,
        WIDTH_V=width,
        BLOCK_Q=block,
        BLOCK_V=block,
        SOFTMAX=True,
    )
    settings = addressed(settings, out, given["d_out"])
    if rows and heads:
        grid = (-(-rows // settings.ROWS), heads)
        triton_kernel.delta_kernel[grid](
            out,
            given["d_out"],
            given["delta"],
            given["out_row"],
            given["out_head"],
            rows,
            S=settings,
            num_warps=4,
        )


def _table_gradients(launch: Launch, given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    from gr_kernels.hstu_attention import triton_kernel

    bias = launch.problem.bias
    if bias.position is None and bias.time is None:
        return None, None
    tile = launch.tile("tables")
    blocks = -(-launch.longest[0] // tile.rows)
    # a part's rows may be as far from its keys as a sequence is long
    farthest = launch.longest[1] if launch.problem.part is None else launch.problem.max_length
    positions = 0 if bias.position is None else min(bias.position.shape[0], farthest)
    times = 0 if bias.time is None else bias.buckets.last() + 1  # higher ones are no difference's
    affordable = max(FEWEST_TABLE_PROGRAMS, TABLE_BYTES // (4 * max(1, positions + times)))
    programs = min(launch.sequences * blocks, TABLE_PROGRAMS, affordable)
    position_sums, time_sums = (
        torch.zeros((programs, entries), dtype=torch.float32, device=launch.q.device)
        for entries in (positions, times)
    )
    own = {**given, "position_sums": None, "time_sums": None, "blocks": blocks, "entries": positions}
    if bias.position is not None:
        own["position_sums"] = position_sums
    if bias.time is not None:
        own["time_sums"] = time_sums
    launch.run(triton_kernel.table_gradients_kernel, launch.settings(tile), tile, programs, own)
    d_position, d_time = None, None
    if bias.position is not None:
        d_position = torch.zeros(bias.position.shape, dtype=bias.position.dtype, device=launch.q.device)
        d_position[:positions] = position_sums.sum(0) * launch.score_scale
    if bias.time is not None:
        d_time = torch.zeros_like(bias.time)
        d_time[:times] = time_sums.sum(0) * launch.score_scale
    return d_position, d_time


attention = Operators("hstu_attention_triton", forward, backward, softmax_gives_lse=True)
