"""Calls of the attention with their answers: random inputs, plain PyTorch in float64, dropout written independently."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from gr_kernels import RelativeBias, TimeBuckets, hstu_attention
from gr_kernels.hstu_attention.reference import definition as specification
from tests.precision import analysed, assert_within

LENGTHS = (7, 0, 1, 100, 33, 2, 0, 200, 64)
DROPOUT, KEY = 0.3, 2**63 + 12345


@dataclasses.dataclass(frozen=True)
class Case:
    """One call's inputs in float32, leaves of one projection as the layers have them."""

    projection: Tensor  # (T, 2 H V + 2 H Q): u, v, q, k side by side
    heads: int
    query_width: int
    value_width: int
    offsets: Tensor
    bias: RelativeBias
    d_out: Tensor  # (rows, H, V)
    max_length: int
    query_lengths: tuple[int, ...] | None = (
        None  # the cross form: queries are so many last rows of each sequence
    )

    def qkv(self, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, heads = projection.shape[0], self.heads
        widths = [heads * self.value_width] * 2 + [heads * self.query_width] * 2
        _, v, q, k = torch.split(projection, widths, dim=1)
        widths_of = ((q, self.query_width), (k, self.query_width), (v, self.value_width))
        q, k, v = (x.view(rows, heads, width) for x, width in widths_of)
        return q[self.query_rows()], k, v

    def query_rows(self) -> Tensor | slice:
        """Which rows are queries."""
        if self.query_lengths is None:
            return slice(None)
        ends = self.offsets[1:].tolist()
        rows = [range(end - m, end) for end, m in zip(ends, self.query_lengths)]
        return torch.tensor([row for some in rows for row in some], dtype=torch.int64)

    def form(self) -> dict[str, Tensor]:
        """The arguments of the cross form."""
        if self.query_lengths is None:
            return {}
        return {"query_offsets": torch.tensor([0, *itertools.accumulate(self.query_lengths)])}


def session_times(rows: int, generator: torch.Generator) -> Tensor:
    """Ascending times with ties, seconds and years between neighbours."""
    gap = 10 ** (torch.rand(rows, generator=generator) * 8)
    return (gap * (torch.rand(rows, generator=generator) < 0.8)).long().cumsum(0) + 978_300_000


def make_case(
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = 1,
    query_width: int = 25,
    value_width: int = 25,
    bias: str = "both",
    seed: int = 0,
    max_length: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    max_length = max_length or max((1, *lengths))
    times = session_times(rows + 1, generator)
    buckets = TimeBuckets()
    return Case(
        projection=torch.randn(rows, 2 * heads * (query_width + value_width), generator=generator),
        heads=heads,
        query_width=query_width,
        value_width=value_width,
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        bias=RelativeBias(
            position=torch.randn(max_length, generator=generator) if bias in ("position", "both") else None,
            time=torch.randn(buckets.count, generator=generator) if bias in ("time", "both") else None,
            query_times=times[1:],
            key_times=times[:-1],
            buckets=buckets,
        ),
        d_out=torch.randn(rows, heads, value_width, generator=generator),
        max_length=max_length,
    )


def run(case: Case, dtype: torch.dtype, implementation: str, **settings: object) -> dict[str, Tensor]:
    """Output and gradients of one implementation, or of the "specification"."""
    projection = case.projection.to(dtype, copy=True).requires_grad_()
    tables = {
        name: None if table is None else table.to(dtype, copy=True).requires_grad_()
        for name, table in (("position", case.bias.position), ("time", case.bias.time))
    }
    queries = case.query_rows()
    times = None if case.bias.query_times is None else case.bias.query_times[queries]
    bias = dataclasses.replace(case.bias, **tables, query_times=times)
    q, k, v = case.qkv(projection)
    settings |= case.form()
    if implementation == "specification":
        out = specification(q, k, v, case.offsets, bias=bias, **settings)  # type: ignore[arg-type]
    else:
        out = hstu_attention(
            q, k, v, case.offsets, max_length=case.max_length, bias=bias,
            implementation=implementation, **settings,  # type: ignore[arg-type]
        )  # fmt: skip
    out.backward(case.d_out[queries].to(dtype))
    results = {"out": out.detach(), "projection": projection.grad}
    results |= {name: table.grad for name, table in tables.items() if table is not None}
    return {name: value for name, value in results.items() if value is not None}


def assert_close_to_specification(
    case: Case,
    implementation: str,
    factors: list[Tensor] | None,
    settings: dict,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Within the bound on rounding, of inputs rounded to the dtype first."""
    dropout = {} if factors is None else {"dropout": DROPOUT, "dropout_key": KEY}
    tables = {name: getattr(case.bias, name) for name in ("position", "time")}
    rounded = {name: None if table is None else table.to(dtype).float() for name, table in tables.items()}
    case = dataclasses.replace(
        case,
        projection=case.projection.to(dtype).float(),
        d_out=case.d_out.to(dtype).float(),
        bias=dataclasses.replace(case.bias, **rounded),
    )
    exact, allowed = analysed(
        lambda: run(case, torch.float64, "specification", **settings, factors=factors), dtype
    )
    assert_within(run(case, dtype, implementation, **settings, **dropout), exact, allowed, dtype)


def philox(key: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of (..., 4) counters, written from the paper independently of the package."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., word].astype(np.uint64) for word in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> shift) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=-1)


def dropout_factors(case: Case, dropout: float = DROPOUT, key: int = KEY) -> list[Tensor]:
    """What the weights of each sequence are multiplied by, (H, n, n)."""
    factors = []
    edges = case.offsets.tolist()
    for begin, end in itertools.pairwise(edges):
        n = end - begin
        counter = np.zeros((case.heads, n, -(-n // 4), 4), dtype=np.uint64)
        counter[..., 0] = np.arange(begin, end)[:, None]
        counter[..., 1] = np.arange(case.heads)[:, None, None]
        counter[..., 2] = np.arange(counter.shape[2])
        words = philox(key, counter).reshape(case.heads, n, counter.shape[2] * 4)[..., :n]
        factors.append(torch.from_numpy((words >= dropout * 2**32) / (1 - dropout)))
    return factors
