"""Power laws of a loss, fitted to trained models.

    L(C)    = E + A C^-alpha                      of compute          (Kaplan et al., arXiv 2001.08361)
    L(N, D) = E + A N^-alpha + B D^-beta          of size and data    (Hoffmann et al., arXiv 2203.15556, equation 10)

each with its irreducible loss E or without (``floor``).  The logarithms are fitted, by Huber's loss, from many starts.
Intervals are a residual bootstrap's: residuals, widened for the degrees of freedom that the fit has taken, are drawn
anew around the fitted curve, each draw times sqrt(nu / chi^2(nu)), nu = points - coefficients, for the spread itself is
known from so few points alone (in a linear model that turns the normal interval into Student's).

Shapes: M points, V variables (1: compute; 2: size and data), P coefficients, R replicates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize

from gr.errors import UserError

Array = np.ndarray

NAMES = (("A", "alpha"), ("B", "beta"))
START_FLOORS = (0.02, 0.5, 0.9, 0.99)
"""First guesses of E, as shares of the least loss."""
START_EXPONENTS = (0.05, 0.15, 0.4, 1.0)
HUBER = 1.345
"""Of the residuals' spread: where squares turn into absolute values (95 % efficient if they are normal)."""
LEAST_DELTA = 1e-9


@dataclass(frozen=True)
class Prediction:
    """A loss, and what 95 % of runs at that place should lie in (``low`` to ``high``)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    coefficients: E (with ``floor``), A, alpha (B, beta).  intervals: 95 % of each.  r2: of log loss.  aic, aicc: of the
    residuals of log loss as normal, their spread counted as a coefficient; aicc (for few points) is infinite where
    there are not enough.  delta: Huber's, in log loss.  residuals_M: log loss, measured minus fitted.  x_MV: logarithms
    of the variables less their mean; theta_P: what was fitted, as :func:`derivatives` takes it.
    """

    variables: tuple[str, ...]
    floor: bool
    coefficients: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    r2: float
    aic: float
    aicc: float
    delta: float
    residuals_M: Array
    x_MV: Array = field(repr=False)
    theta_P: Array = field(repr=False)
    _centre_V: Array = field(repr=False)
    _replicates_RP: Array = field(repr=False)
    _noise_R: Array = field(repr=False)

    def loss(self, *at: float | Array) -> Array:
        """(M,) the law's loss at these values of its variables, an array or a number each."""
        return np.exp(_log_loss(self.theta_P[None], self._x(at), self.floor)[0])

    def band(self, *at: float | Array) -> tuple[Array, Array]:
        """(low_M, high_M): the 95 % interval of the law itself at each place."""
        low, high = np.quantile(self._curves(at), (0.025, 0.975), axis=0)
        return np.exp(low), np.exp(high)

    def predict(self, *at: float) -> Prediction:
        """The loss of a new run at one place, with its 95 % interval: the law's uncertainty and a run's own."""
        curves_R = self._curves(at)[:, 0] + self._noise_R
        low, high = np.exp(np.quantile(curves_R, (0.025, 0.975)))
        return Prediction(float(self.loss(*at)[0]), float(low), float(high))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite AICc is None."""
        return {
            "variables": list(self.variables),
            "coefficients": self.coefficients,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "r2": self.r2,
            "aic": self.aic,
            "aicc": self.aicc if np.isfinite(self.aicc) else None,
            "delta": self.delta,
            "residuals": self.residuals_M.tolist(),
        }

    def _x(self, at: Sequence[float | Array]) -> Array:
        if len(at) != len(self.variables):
            raise ValueError(f"a law of {', '.join(self.variables)} takes {len(self.variables)} values")
        columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(a, float)) for a in at))
        return np.log(np.stack(columns, 1)) - self._centre_V

    def _curves(self, at: Sequence[float | Array]) -> Array:
        """(R, M) log losses of every replicate."""
        return _log_loss(self._replicates_RP, self._x(at), self.floor)


def fit_compute(
    compute: Sequence[float], losses: Sequence[float], *, floor: bool, replicates: int = 400, seed: int = 0
) -> Fit:
    """L(C) = [E +] A C^-alpha.  compute: in any unit, which A is of."""
    return fit({"compute": compute}, losses, floor=floor, replicates=replicates, seed=seed)


def fit_size_and_data(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    floor: bool = True,
    replicates: int = 400,
    seed: int = 0,
) -> Fit:
    """L(N, D) = [E +] A N^-alpha + B D^-beta."""
    variables = {"parameters": parameters, "tokens": tokens}
    return fit(variables, losses, floor=floor, replicates=replicates, seed=seed)


def coefficient_names(variables: int, floor: bool) -> list[str]:
    return [*(["E"] if floor else []), *itertools.chain(*NAMES[:variables])]


def fit(
    variables: dict[str, Sequence[float]],
    losses: Sequence[float],
    *,
    floor: bool,
    delta: float | None = None,
    replicates: int = 400,
    seed: int = 0,
) -> Fit:
    """A law of one or two variables.  delta: Huber's, in log loss; without it HUBER times the residuals' spread.

    Raises UserError where the points cannot tell the coefficients.
    """
    values_MV, losses_M = _checked(variables, losses, floor)
    logs_MV, y_M = np.log(values_MV), np.log(losses_M)
    centre_V = logs_MV.mean(0)
    x_MV = logs_MV - centre_V
    theta_P, delta = _robust(x_MV, y_M, floor, delta)
    fitted_M = _log_loss(theta_P[None], x_MV, floor)[0]
    residuals_M = y_M - fitted_M
    points, count = len(y_M), len(theta_P)
    free = points - count
    rng = np.random.default_rng(seed)
    widened_M = (residuals_M - residuals_M.mean()) * (points / free) ** 0.5
    scale_R1 = np.sqrt(free / rng.chisquare(free, (replicates, 1)))
    draws_RM = rng.choice(widened_M, (replicates, points)) * scale_R1
    tiled_RP = np.tile(theta_P, (replicates, 1))
    replicates_RP = _damped(tiled_RP, x_MV, fitted_M + draws_RM, floor, delta)[0]
    names = coefficient_names(x_MV.shape[1], floor)
    found_P, found_RP = (_readable(theta, centre_V, floor) for theta in (theta_P[None], replicates_RP))
    low_P, high_P = np.quantile(found_RP, (0.025, 0.975), axis=0)
    aic, aicc = _information(residuals_M, count + 1)
    return Fit(
        variables=tuple(variables),
        floor=floor,
        coefficients=dict(zip(names, found_P[0].tolist())),
        intervals=dict(zip(names, zip(low_P.tolist(), high_P.tolist()))),
        r2=float(1 - (residuals_M**2).sum() / max(((y_M - y_M.mean()) ** 2).sum(), 1e-300)),
        aic=aic,
        aicc=aicc,
        delta=delta,
        residuals_M=residuals_M,
        x_MV=x_MV,
        theta_P=theta_P,
        _centre_V=centre_V,
        _replicates_RP=replicates_RP,
        _noise_R=rng.choice(widened_M, replicates) * scale_R1[:, 0],
    )


@dataclass(frozen=True)
class Optimum:
    """The size and the data that a compute buys most with, and the loss there."""

    compute: float
    parameters: float
    tokens: float
    loss: float


def optimal(law: Fit, compute: float, flops_per_parameter_and_token: float = 6.0) -> Optimum:
    """Where L(N, D) is least under C = k N D (Hoffmann et al., equation 4)."""
    if law.variables != ("parameters", "tokens"):
        raise ValueError("the optimum is one of size against data: fit_size_and_data gives such a law")
    A, alpha, B, beta = (law.coefficients[name] for name in ("A", "alpha", "B", "beta"))
    if min(alpha, beta) <= 0:
        raise UserError(
            f"more does not help by this law (alpha {alpha:.3g}, beta {beta:.3g}), so that no compute is best spent: "
            "fit it to more members"
        )
    total = compute / flops_per_parameter_and_token
    # A alpha N^-alpha = B beta D^-beta at the optimum; in logarithms, for A and B may be large
    log_size = (np.log(alpha * A) - np.log(beta * B) + beta * np.log(total)) / (alpha + beta)
    parameters = float(np.exp(log_size))
    tokens = total / parameters
    return Optimum(compute, parameters, tokens, float(law.loss(parameters, tokens)[0]))


def frontier(compute: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The points than which nothing that costs as much or less is better, from the cheapest on."""
    best, found = np.inf, []
    for i in sorted(range(len(losses)), key=lambda i: (compute[i], losses[i])):
        if losses[i] < best:
            best = losses[i]
            found.append(i)
    return found


# -- fitting -----------------------------------------------------------------------------------------------------------
# theta: log E (with a floor), then for each variable (log of its term at the centre, exponent)

DAMPED_STEPS = 40


def _log_terms(theta_RP: Array, x_MV: Array, floor: bool) -> Array:
    """(R, M, [1 +] V) logarithms of the law's terms."""
    first = int(floor)
    terms = theta_RP[:, None, first::2] - theta_RP[:, None, first + 1 :: 2] * x_MV
    if not floor:
        return terms
    return np.concatenate([np.broadcast_to(theta_RP[:, None, :1], (*terms.shape[:2], 1)), terms], axis=2)


def _log_loss(theta_RP: Array, x_MV: Array, floor: bool) -> Array:
    """(R, M)."""
    return np.logaddexp.reduce(_log_terms(theta_RP, x_MV, floor), axis=2)


def derivatives(theta_RP: Array, x_MV: Array, floor: bool) -> Array:
    """(R, M, P) of the log loss at each place, by log E (with a floor), then for each variable by the log of its term
    at the centre and by its exponent."""
    terms, first = _log_terms(theta_RP, x_MV, floor), int(floor)
    share = np.exp(terms - np.logaddexp.reduce(terms, axis=2)[:, :, None])
    slope_RMP = np.empty((*terms.shape[:2], theta_RP.shape[1]))
    slope_RMP[:, :, :first] = share[:, :, :first]
    slope_RMP[:, :, first::2] = share[:, :, first:]
    slope_RMP[:, :, first + 1 :: 2] = -share[:, :, first:] * x_MV
    return slope_RMP


def _bent(
    theta_RP: Array, x_MV: Array, y_RM: Array, floor: bool, delta: float, slopes: bool = True
) -> tuple[Array, Array]:
    """(R, M) what a sum of squares makes Huber's loss of the residuals, and (R, M, P) its derivatives.

    It is sign(r) sqrt(2 huber(r)), which has a continuous derivative: methods of least squares take it as it is."""
    r_RM = _log_loss(theta_RP, x_MV, floor) - y_RM
    far_RM = np.abs(r_RM) > delta
    outer_RM = np.sqrt(np.where(far_RM, 2 * delta * np.abs(r_RM) - delta**2, delta**2))
    bent_RM = np.where(far_RM, np.sign(r_RM) * outer_RM, r_RM)
    if not slopes:
        return bent_RM, bent_RM
    slope_RMP = derivatives(theta_RP, x_MV, floor)
    return bent_RM, slope_RMP * np.where(far_RM, delta / outer_RM, 1.0)[:, :, None]


def _damped(theta_RP: Array, x_MV: Array, y_RM: Array, floor: bool, delta: float) -> tuple[Array, Array]:
    """(theta_RP, Huber's loss_R) after Levenberg and Marquardt's steps, for all replicates (or starts) together: that
    is what makes hundreds of them cheap."""
    theta_RP, damping_R = theta_RP.copy(), np.full(len(theta_RP), 1e-3)
    bent_RM, slope_RMP = _bent(theta_RP, x_MV, y_RM, floor, delta)
    loss_R = (bent_RM**2).sum(1)
    eye_PP = np.eye(theta_RP.shape[1])
    for _ in range(DAMPED_STEPS):
        normal_RPP = slope_RMP.transpose(0, 2, 1) @ slope_RMP
        diagonal_RP = np.diagonal(normal_RPP, axis1=1, axis2=2) + 1e-9
        damped_RPP = normal_RPP + (damping_R[:, None] * diagonal_RP)[:, None] * eye_PP
        pull_RP1 = slope_RMP.transpose(0, 2, 1) @ bent_RM[:, :, None]
        step_RP = np.linalg.solve(damped_RPP, pull_RP1)[:, :, 0].clip(-2.0, 2.0)
        tried_RP = theta_RP - step_RP
        tried_bent_RM, tried_slope_RMP = _bent(tried_RP, x_MV, y_RM, floor, delta)
        tried_R = (tried_bent_RM**2).sum(1)
        better_R = tried_R < loss_R
        theta_RP[better_R], loss_R[better_R] = tried_RP[better_R], tried_R[better_R]
        bent_RM[better_R], slope_RMP[better_R] = tried_bent_RM[better_R], tried_slope_RMP[better_R]
        damping_R = np.clip(np.where(better_R, damping_R / 5, damping_R * 5), 1e-12, 1e8)
        if np.abs(step_RP).max() < 1e-9:
            break
    return theta_RP, loss_R


def _solve(starts_RP: Array, x_MV: Array, y_M: Array, floor: bool, delta: float) -> Array:
    """theta of the least Huber loss: the best of the starts, brought to its end by MINPACK."""
    found_RP, loss_R = _damped(starts_RP, x_MV, np.tile(y_M, (len(starts_RP), 1)), floor, delta)
    best_P = found_RP[np.argmin(loss_R)]
    theta_P, *_ = optimize.leastsq(
        lambda t: _bent(t[None], x_MV, y_M[None], floor, delta, slopes=False)[0][0],
        best_P,
        Dfun=lambda t: _bent(t[None], x_MV, y_M[None], floor, delta)[1][0],
        xtol=1e-12,
        ftol=1e-14,
        full_output=True,
    )
    return theta_P


def _robust(x_MV: Array, y_M: Array, floor: bool, delta: float | None) -> tuple[Array, float]:
    """The best theta of many starts, and the delta it was found with."""
    starts_RP = np.stack(list(_starts(x_MV, y_M, floor)))
    if delta is not None:
        return _solve(starts_RP, x_MV, y_M, floor, delta), delta
    # absolute values, nearly: no outlier bends the residuals that tell the spread
    theta_P = _solve(starts_RP, x_MV, y_M, floor, max(float(np.std(y_M)) * 1e-2, LEAST_DELTA))
    r_M = np.abs(y_M - _log_loss(theta_P[None], x_MV, floor)[0])
    # such a fit passes through as many points as it has coefficients: the others tell
    scale = 1.4826 * float(np.median(np.sort(r_M)[len(theta_P) :]))
    delta = max(HUBER * scale, LEAST_DELTA)
    return _solve(np.vstack([theta_P, starts_RP]), x_MV, y_M, floor, delta), delta


def _starts(x_MV: Array, y_M: Array, floor: bool) -> Iterator[Array]:
    variables, least, middle = x_MV.shape[1], float(np.exp(y_M.min())), float(np.exp(y_M.mean()))
    for share in START_FLOORS if floor else (0.0,):
        rest = np.log((middle - share * least) / variables + 1e-12 * middle)
        for exponents in itertools.product(START_EXPONENTS, repeat=variables):
            head = [np.log(share * least)] if floor else []
            yield np.array([*head, *itertools.chain(*((rest, e) for e in exponents))])


def _readable(theta_RP: Array, centre_V: Array, floor: bool) -> Array:
    """(R, P) coefficients as they are written: E, A, alpha ..."""
    first = int(floor)
    found = theta_RP.copy()
    found[:, first::2] = np.exp(
        np.minimum(theta_RP[:, first::2] + theta_RP[:, first + 1 :: 2] * centre_V, 700.0)
    )
    if floor:
        found[:, 0] = np.exp(theta_RP[:, 0])
    return found


def _information(residuals_M: Array, count: int) -> tuple[float, float]:
    """(AIC, AICc) with ``count`` coefficients, the spread among them."""
    points = len(residuals_M)
    variance = max(float((residuals_M**2).mean()), 1e-300)
    aic = points * (np.log(2 * np.pi * variance) + 1) + 2 * count
    left = points - count - 1
    return float(aic), float(aic + 2 * count * (count + 1) / left) if left > 0 else float("inf")


def _checked(
    variables: dict[str, Sequence[float]], losses: Sequence[float], floor: bool
) -> tuple[Array, Array]:
    """(M, V) and (M,) float64; refuses what no law can be fitted to."""
    losses_M = np.asarray(losses, float)
    columns = {name: np.asarray(values, float) for name, values in variables.items()}
    names = coefficient_names(len(columns), floor)
    for name, values_M in {**columns, "loss": losses_M}.items():
        if values_M.shape != losses_M.shape:
            raise UserError(f"{len(values_M)} values of {name} for {len(losses_M)} losses: give one for each")
        if (bad := np.flatnonzero(~(np.isfinite(values_M) & (values_M > 0)))).size:
            raise UserError(
                f"the {name} of point {bad[0] + 1} is {values_M[bad[0]]:g}, and a power law is fitted to logarithms: "
                "give positive numbers alone"
            )
    if len(losses_M) <= len(names):
        raise UserError(
            f"a law with {len(names)} coefficients ({', '.join(names)}) needs {len(names) + 1} points or more, and "
            f"there are {len(losses_M)}: train more members, or fit a law with fewer"
        )
    needed = 3 if floor and len(columns) == 1 else 2
    for name, values_M in columns.items():
        if (different := len(np.unique(values_M))) < needed:
            raise UserError(
                f"the points have {different} different values of {name}, and a law of it needs {needed} or more: "
                "train members that differ in it"
            )
    return np.stack(list(columns.values()), 1), losses_M
