"""Scores of queries against candidate rows of a table: one function, several ways of computing it.

Shapes: T queries, K candidates, I catalogue size, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gr_kernels import native
from gr_kernels.candidate_scores import cpp, dense, gather, reference

Rows = Tensor | range | slice
IMPLEMENTATIONS = ("auto", "reference", "cpp", "dense", "gather")

# Cost of one multiply-add against a gathered row, in multiply-adds of a GEMM (measured, forward and backward
# together: benchmarks/kernels/candidate_scores_cpu.py). On an accelerator the gather runs at memory speed.
_CPP_COST = 3.2
_GATHER_COST = {"cpu": 45.0, "cuda": 100.0}


@dataclass(frozen=True)
class Plan:
    """The way chosen for one call, and the reason in a sentence."""

    implementation: str
    why: str


def explain(
    tokens: int,
    candidates: int,
    catalogue: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """How ``candidate_scores`` computes (T, K) candidates of a catalogue of I rows under 'auto', and why.

    The dense way costs T x I, the others T x K times what a gathered row costs more than a GEMM's.
    """
    kind = torch.device(device).type
    if kind == "cpu" and dtype == torch.float32 and native.available():
        way, cost = "cpp", _CPP_COST
    else:
        way, cost = "gather", _GATHER_COST.get(kind, _GATHER_COST["cuda"])
    if candidates * cost > catalogue:
        return Plan(
            "dense",
            f"{candidates} candidates x {cost:g} (cost of a gathered row) exceed the {catalogue} rows of the "
            "catalogue: one GEMM against all of it is cheaper",
        )
    return Plan(
        way,
        f"{candidates} candidates x {cost:g} (cost of a gathered row) are below the {catalogue} rows of the "
        f"catalogue, for {dtype} on {kind}" + ("" if way == "cpp" else " without the C++ operator"),
    )


def candidate_scores(
    queries_TD: Tensor,
    table_ID: Tensor,
    rows: Rows,
    *,
    normalize_eps: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Inner products of queries with candidate rows of a table.

    queries_TD: (T, D); table_ID: (I, D) of the same float dtype. rows:
      (T, K) int64 or int32: each query's own candidates -> (T, K);
      (K,) integers: candidates all queries share -> (T, K);
      range or slice: a stretch of the catalogue -> (T, len), one GEMM against a view.
    With normalize_eps the score is ``q . e / max(|e|, normalize_eps)``: cosine similarity when the caller has
    normalised the queries. Differentiable once in queries and table (a dense (I, D) gradient, exact through the
    normalisation; where |e| < eps the divisor is a constant). T x K x D values never exist except in 'reference'.

    implementation: 'auto' (see ``explain``), 'reference', 'cpp' (float32 on CPU), 'dense', 'gather'; it matters
    for (T, K) rows alone. Every way gives the same scores but for rounding.

    Raises IndexError naming the first row outside the table (on CPU; on an accelerator the device asserts), and
    ValueError or TypeError for shapes, dtypes and names that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}"
        )
    _check_inputs(queries_TD, table_ID, normalize_eps)
    if isinstance(rows, (range, slice)):
        return queries_TD @ _normalized(table_ID[_as_slice(rows, table_ID.shape[0])], normalize_eps).t()
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"candidate rows must be int64 or int32, not {rows.dtype}")
    if rows.dim() == 1:
        _check_rows(rows, table_ID.shape[0])
        return queries_TD @ _normalized(F.embedding(rows, table_ID), normalize_eps).t()
    if rows.dim() != 2 or rows.shape[0] != queries_TD.shape[0]:
        raise ValueError(
            f"rows must be (T, K) with T = {queries_TD.shape[0]} queries, or (K,), not {tuple(rows.shape)}"
        )
    if implementation == "auto":
        plan = explain(
            rows.shape[0], rows.shape[1], table_ID.shape[0], device=queries_TD.device, dtype=queries_TD.dtype
        )
        implementation = plan.implementation
    if implementation == "cpp":
        return cpp.candidate_scores(queries_TD, table_ID, rows, normalize_eps)
    _check_rows(rows, table_ID.shape[0])
    ways = {"reference": reference, "dense": dense, "gather": gather}
    return ways[implementation].candidate_scores(queries_TD, table_ID, rows, normalize_eps)


def _normalized(rows_KD: Tensor, normalize_eps: float | None) -> Tensor:
    return rows_KD if normalize_eps is None else F.normalize(rows_KD, dim=-1, eps=normalize_eps)


def _as_slice(rows: range | slice, catalogue: int) -> slice:
    if isinstance(rows, slice):
        rows = range(catalogue)[rows]
    if rows.step < 1:
        raise ValueError(f"a range of candidate rows must go upwards, not by {rows.step}")
    if len(rows) and not (0 <= rows[0] and rows[-1] < catalogue):
        raise IndexError(f"candidate rows {rows} reach outside the table of {catalogue} rows")
    return slice(rows.start, max(rows.start, rows.stop), rows.step) if len(rows) else slice(0, 0)


def _check_inputs(queries_TD: Tensor, table_ID: Tensor, normalize_eps: float | None) -> None:
    if queries_TD.dim() != 2 or table_ID.dim() != 2 or queries_TD.shape[1] != table_ID.shape[1]:
        raise ValueError(
            "queries must be (T, D) and the table (I, D) with the same D, not "
            f"{tuple(queries_TD.shape)} and {tuple(table_ID.shape)}"
        )
    if queries_TD.dtype != table_ID.dtype or not queries_TD.dtype.is_floating_point:
        raise TypeError(
            f"queries and table must share a float dtype, not {queries_TD.dtype} and {table_ID.dtype}"
        )
    if queries_TD.device != table_ID.device:
        raise ValueError(f"queries are on {queries_TD.device}, the table on {table_ID.device}: move one")
    if normalize_eps is not None and not normalize_eps > 0:
        raise ValueError(
            f"normalize_eps must be positive (or None for plain inner products), got {normalize_eps}"
        )


def _check_rows(rows: Tensor, catalogue: int) -> None:
    """IndexError for the first row outside [0, catalogue). On an accelerator this would wait for it: skipped."""
    if rows.device.type != "cpu" or rows.numel() == 0:
        return
    low, high = torch.aminmax(rows)
    if low >= 0 and high < catalogue:
        return
    first = int(((rows < 0) | (rows >= catalogue)).flatten().nonzero()[0])
    where = (
        f"candidate {first}"
        if rows.dim() == 1
        else (f"query {first // rows.shape[1]}, candidate {first % rows.shape[1]}")
    )
    raise IndexError(
        f"candidate row {int(rows.flatten()[first])} ({where}) is outside the table of {catalogue} rows: "
        f"rows must lie in [0, {catalogue})"
    )
