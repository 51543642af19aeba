"""Scores of queries against candidate rows of a table: one function, several ways of computing it.

Shapes: T queries, K candidates, I catalogue size, D width.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from gr_kernels.candidate_scores import cpp, dense, gather, reference
from gr_kernels.dispatch import Implementation, choose, takes_all
from gr_kernels.rows import check_inputs, check_kind, check_range

Rows = Tensor | range | slice

# Cost of one multiply-add against a gathered row, in multiply-adds of a GEMM (measured, forward and backward
# together). On an accelerator the gather runs at memory speed.
_CPP_COST = 3.2
_GATHER_COST = {"cpu": 45.0, "cuda": 100.0}

_CPP = Implementation("cpp", cpp.obstacle, cpp.candidate_scores, "float32 on cpu", register=cpp.register)
_DENSE = Implementation("dense", takes_all, dense.candidate_scores, "GEMMs against the whole catalogue")
_GATHER = Implementation("gather", takes_all, gather.candidate_scores, "rows gathered chunk by chunk")
_REFERENCE = Implementation("reference", takes_all, reference.candidate_scores, "the definition")
IMPLEMENTATIONS = (_CPP, _GATHER, _DENSE, _REFERENCE)


def _cheapest_first(candidates: int, queries_TD: Tensor, table_ID: Tensor) -> list[Implementation]:
    """The implementations for (T, K) rows of I: the dense way costs T x I, gathering ways T x K times a factor."""
    catalogue = table_ID.shape[0]
    if cpp.obstacle(queries_TD):
        cost = _GATHER_COST.get(queries_TD.device.type, _GATHER_COST["cuda"])
    else:
        cost = _CPP_COST
    gathering = f"{candidates} candidates x {cost:g} (cost of a gathered row)"
    if candidates * cost > catalogue:
        why = f"{gathering} exceed the {catalogue} rows of the catalogue: GEMMs against all of it are cheaper"
        return [replace(_DENSE, merit=why), _CPP, _GATHER, _REFERENCE]
    why = f"{gathering} are below the {catalogue} rows of the catalogue"
    return [replace(_CPP, merit=why), replace(_GATHER, merit=why), _DENSE, _REFERENCE]


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

    implementation: 'auto', the cheapest of 'cpp' (float32 on CPU), 'dense' and 'gather' (gr_kernels.explain tells
    which), or one of them or 'reference' by name; it matters for (T, K) rows alone. Every way gives the same scores
    but for rounding.

    Raises IndexError naming the first row outside the table (on CPU, outside torch.compile; on an accelerator the
    device asserts), and ValueError or TypeError for shapes, dtypes and names that do not fit.
    """
    check_inputs(queries_TD, table_ID, normalize_eps)
    if isinstance(rows, Tensor):
        check_kind(rows, "candidate rows")
    if isinstance(rows, Tensor) and rows.dim() == 2:
        if rows.shape[0] != queries_TD.shape[0]:
            raise ValueError(_wrong_shape(queries_TD, rows))
        ways = _cheapest_first(rows.shape[1], queries_TD, table_ID)
        call = (queries_TD, table_ID, rows, normalize_eps)
        chosen = choose("candidate_scores", ways, queries_TD.device, call, implementation).implementation
        if chosen.name != "cpp":  # which looks at them itself
            check_range(rows, table_ID.shape[0], "candidate")
        scores_TK: Tensor = chosen.run(*call)
        return scores_TK
    choose("candidate_scores", _ONE_GEMM, queries_TD.device, (), implementation)
    if isinstance(rows, (range, slice)):
        return queries_TD @ _normalized(table_ID[_as_slice(rows, table_ID.shape[0])], normalize_eps).t()
    if rows.dim() != 1:
        raise ValueError(_wrong_shape(queries_TD, rows))
    check_range(rows, table_ID.shape[0], "candidate")
    return queries_TD @ _normalized(F.embedding(rows, table_ID), normalize_eps).t()


# Rows that all queries share: every name means this.
_ONE_GEMM = [
    replace(way, obstacle=takes_all, register=None, merit="one GEMM against rows that all queries share")
    for way in (_DENSE, _CPP, _GATHER, _REFERENCE)
]


def _wrong_shape(queries_TD: Tensor, rows: Tensor) -> str:
    return f"rows must be (T, K) with T = {queries_TD.shape[0]} queries, or (K,), not {tuple(rows.shape)}"


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
