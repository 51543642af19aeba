"""Numeric tolerances from arithmetic: see bound.py for the bound, rules.py for single operations.

exact, allowed = analysed(lambda: definition(inputs in float64), torch.float32)
assert_within(implementation(inputs), exact, allowed)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.precision.analysis import Analysis
from tests.precision.bound import TINY, UNIT, growth

__all__ = ["TINY", "UNIT", "Analysis", "after_steps", "analysed", "assert_within", "growth", "tolerance"]

Named = Mapping[str, Tensor]


def analysed(
    compute: Callable[[], Named], dtype: torch.dtype, wide: bool = True, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(results of ``compute``, which runs in float64; how far those of a computation in ``dtype`` may be from them).

    wide, scale: see Analysis.
    """
    with Analysis(dtype, wide, scale) as analysis:
        exact = dict(compute())
    # of a computation in float64 too, both sides are off
    sides = 2 if dtype == torch.float64 else 1
    return exact, {name: sides * analysis.error(value) for name, value in exact.items()}


def assert_within(
    found: Named,
    exact: Named,
    allowed: Named,
    dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None,
) -> None:
    """Every number within its bound of the exact one, and of one rounding more to the dtype it is written in.

    dtypes: what the results' dtypes must be, all or by name.
    """
    assert found.keys() == exact.keys(), (sorted(found), sorted(exact))
    for name, value in found.items():
        want = exact[name].detach().cpu()
        if dtypes is not None:
            expected = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
            assert value.dtype == expected, f"{name}: {value.dtype}, not {expected}"
        assert value.shape == want.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(want.shape)}"
        got = value.detach().cpu().double()
        limit = allowed[name].cpu()
        limit = limit + UNIT[value.dtype] * (want.abs() + limit) + TINY[value.dtype]
        same = (got == want) | (got.isnan() & want.isnan())  # infinities too
        ratio = torch.where(same, 0.0, (got - want).abs() / limit).nan_to_num(nan=torch.inf)
        worst = float(ratio.max()) if ratio.numel() else 0.0
        _report(name, value.dtype, worst)
        if worst > 1.0:
            at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
            raise AssertionError(
                f"{name}{list(at)}: {float(got[at]):.9g} is {float((got - want)[at].abs()):.3g} from the exact "
                f"{float(want[at]):.9g}, where rounding explains {float(limit[at]):.3g}"
            )


def tolerance(
    terms: float, stages: int = 1, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> dict[str, float]:
    """For torch.testing.assert_close of two computations, both rounded, of a chain of sums.

    Each of the ``stages`` of the chain sums at most ``terms`` terms, whose sizes add up to at most ``size`` or, where
    results are larger than that, to as much as the result: 2 stages growth(terms) u of it.
    """
    share = 2 * stages * float(growth(terms)) * UNIT[dtype]
    return {"rtol": share, "atol": share * size}


def after_steps(steps: int, terms: float, condition: float) -> float:
    """By how much of itself a loss may be off after so many steps of training in float32.

    Each step rounds sums of at most ``terms`` terms, by growth(terms) u of their size, and of a relative change of
    the parameters a loss has at most ``condition`` times as much.
    """
    return steps * condition * float(growth(terms)) * UNIT[torch.float32]


def _report(name: str, dtype: torch.dtype, share: float) -> None:
    """GR_PRECISION_REPORT names a file: a line for each result, with its share of what is allowed."""
    if path := os.environ.get("GR_PRECISION_REPORT"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        with open(path, "a") as file:
            file.write(f"{share:.4f} {str(dtype).removeprefix('torch.')} {name} {test}\n")
