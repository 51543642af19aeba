"""Whether members tell a law of size and data, L(N, D) = E + A N^-alpha + B D^-beta, and which would.

A law is told where each of its exponents is known to within half of itself.  By two that are, and are about alike, the
best size under a compute, N* = k C^(beta / (alpha + beta)), grows with an exponent of a quarter to three quarters:
beyond that the fit says no more than that both help.  Half a 95 % interval is t(M - P) s sqrt((J'J)^-1), with J the
derivatives of log L: it grows where N and D go together or take few values (J'J has no inverse), where members are few
beside the coefficients (t), and where they scatter (s).

Shapes: M members, P coefficients, V variables (2).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gr.scaling.laws import HUBER, Array, Fit, derivatives

KNOWN = 0.5
"""Half the interval of an exponent, as a share of it."""
SCATTER = 0.005
"""What a log loss scatters by, at least: seeds do that, though a few points may lie on a law by luck."""
SINGULAR = 1e-6
"""Of the largest singular value of J, its columns scaled alike: one below it is none."""
APART = 4.0
"""By which sizes, and amounts of data, that would be trained next differ."""
OPEN = 10.0
"""From so wide an interval on an exponent has no value."""
NAMED, MOST = 4, 24
"""Members that a sentence names, and that are looked for."""
USUAL = np.log([0.5, 0.25, 0.25])
"""The shares of E and of the two terms where a law isn't known yet, in the middle of its members,"""
EXPONENTS = (0.34, 0.28)
"""and its exponents (Hoffmann et al., arXiv 2203.15556)."""


@dataclass(frozen=True)
class Told:
    """How well M members tell an exponent: half its 95 % interval as a share of it; infinite where they don't."""

    name: str
    within: float

    @property
    def enough(self) -> bool:
        return self.within <= KNOWN


def told(law: Fit) -> Told:
    """Of the exponent that is told worse."""
    scatter = max(law.delta / HUBER, SCATTER)
    within_V = _within(law.theta_P, law.x_MV, scatter)
    exponents_V = law.theta_P[2::2]
    within_V[exponents_V <= 0] = np.inf
    worst = int(np.argmax(within_V))
    return Told(("alpha", "beta")[worst], float(within_V[worst]))


def why_not(parameters: Sequence[float], tokens: Sequence[float], law: Fit | None) -> str:
    """A sentence about members that don't tell L(N, D): what is lacking, how many more would do, and which.  law: what
    was fitted to them; None where nothing could be."""
    sizes, amounts = np.unique(parameters), np.unique(tokens)
    more = missing(parameters, tokens, SCATTER if law is None else max(law.delta / HUBER, SCATTER))
    have = f"{_counted(len(parameters), 'member')} of {_counted(len(sizes), 'size')} and "
    have += f"{_counted(len(amounts), 'amount')} of data "
    if law is None:
        have += "are too few for five coefficients"
    else:
        found = told(law)
        value = f"{found.name} = {law.coefficients[found.name]:.3g}"
        known = f"{value} ± {100 * found.within:,.0f} %" if found.within < OPEN else f"{found.name} open"
        have += f"leave {known}, and ± {100 * KNOWN:.0f} % is asked"
    if not more:
        return f"{have}, though they would tell a law of the usual exponents: train sizes, or data, further apart"
    named = [f"{n:,.0f} parameters on {d:,.0f} tokens" for n, d in more[:NAMED]]
    others = f" and {len(more) - NAMED} more" if len(more) > NAMED else ""
    count = f"{len(more)} more" if len(more) < MOST else f"{MOST} more at least"
    return f"{have}: by a law of the usual exponents train {count}, such as {'; '.join(named)}{others}"


def missing(
    parameters: Sequence[float], tokens: Sequence[float], scatter: float
) -> list[tuple[float, float]]:
    """(N, D) of further members, the one that tells most first, with which a law of the usual exponents would be told;
    among the sizes and amounts that there are, and others a factor of four apart."""
    have = [(float(n), float(d)) for n, d in zip(parameters, tokens)]
    sizes, amounts = (_spread(values) for values in (parameters, tokens))
    centre_V = np.log(have).mean(0)
    theta_P = np.array([USUAL[0], USUAL[1], EXPONENTS[0], USUAL[2], EXPONENTS[1]])
    candidates = [pair for pair in itertools.product(sizes, amounts) if pair not in have]
    found: list[tuple[float, float]] = []
    while candidates and len(found) < MOST:
        x_MV = np.log([*have, *found]) - centre_V
        if (_within(theta_P, x_MV, scatter) <= KNOWN).all():
            break
        best = min(candidates, key=lambda pair: _blur(theta_P, np.vstack([x_MV, np.log(pair) - centre_V])))
        candidates.remove(best)
        found.append(best)
    return found


def _within(theta_P: Array, x_MV: Array, scatter: float) -> Array:
    """(V,) half the 95 % interval of each exponent, as a share of it."""
    slopes_MP = derivatives(theta_P[None], x_MV, floor=True)[0]
    free = len(slopes_MP) - len(theta_P)
    scale_P = np.linalg.norm(slopes_MP, axis=0)
    infinite_V = np.full(len(theta_P) // 2, np.inf)
    if free < 1 or not scale_P.all():
        return infinite_V
    _, values, turned_PP = np.linalg.svd(slopes_MP / scale_P, full_matrices=False)
    if values[-1] <= SINGULAR * values[0]:
        return infinite_V
    errors_P = scatter * np.linalg.norm(turned_PP / values[:, None], axis=0) / scale_P
    return float(stats.t.ppf(0.975, free)) * errors_P[2::2] / np.abs(theta_P[2::2]).clip(1e-12)


def _blur(theta_P: Array, x_MV: Array) -> float:
    """How little is told: the worse exponent's error where nothing else is known but that no coefficient is huge."""
    slopes_MP = derivatives(theta_P[None], x_MV, floor=True)[0]
    errors_PP = np.linalg.inv(slopes_MP.T @ slopes_MP + 1e-6 * np.eye(len(theta_P)))
    return float((np.diag(errors_PP)[2::2] / theta_P[2::2] ** 2).max())


def _spread(values: Sequence[float]) -> list[float]:
    """The values that there are, with others below and above: three at least."""
    there = sorted({float(value) for value in values})
    return [there[0] / APART, *there, there[-1] * APART]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
