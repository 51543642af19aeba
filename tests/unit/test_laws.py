"""Power laws: known coefficients come back, intervals hold them, and what cannot be fitted is said."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gr.errors import UserError
from gr.scaling import design, laws

TRUE = {"E": 2.0, "A": 30.0, "alpha": 0.3}
DRAWS = 100


def points(seed: int, count: int = 12, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Three decades of compute; losses with noise."""
    compute = np.logspace(1, 4, count)
    losses = TRUE["E"] + TRUE["A"] * compute ** -TRUE["alpha"]
    return compute, losses * np.exp(noise * np.random.default_rng(seed).standard_normal(count))


def test_known_coefficients_lie_within_their_intervals():
    """Each in 90 draws of a hundred or more, and a new, larger run in its own."""
    inside = dict.fromkeys([*TRUE, "new"], 0)
    for seed in range(DRAWS):
        law = laws.fit_compute(*points(seed), floor=True, replicates=150, seed=seed)
        for name, value in TRUE.items():
            low, high = law.intervals[name]
            inside[name] += low <= value <= high
        run = (2 + 30 * 1e5**-0.3) * np.exp(0.01 * np.random.default_rng(1000 + seed).standard_normal())
        found = law.predict(1e5)
        inside["new"] += found.low <= run <= found.high
    assert min(inside.values()) >= 90, inside


def test_exact_points_give_exact_coefficients_and_limits():
    law = laws.fit_compute(*points(0, noise=0.0), floor=True, replicates=20)
    assert law.coefficients == pytest.approx(TRUE, rel=1e-4) and law.r2 == pytest.approx(1)
    assert law.loss(1e30)[0] == pytest.approx(TRUE["E"], rel=1e-4)  # what no compute takes away
    bare = laws.fit_compute([1, 10, 100, 1000], [8, 4, 2, 1], floor=False, replicates=20)
    assert bare.coefficients == pytest.approx({"A": 8, "alpha": np.log10(2)}, rel=1e-6)
    assert bare.loss(np.array([1e4, 1e5])) == pytest.approx([0.5, 0.25], rel=1e-6)


def test_slopes_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    x_MV, y_RM = rng.standard_normal((7, 2)), rng.standard_normal((1, 7))
    for floor, count in ((True, 5), (False, 4)):
        theta = rng.standard_normal((1, count))
        for delta in (0.05, 100.0):  # beyond it, and within
            _, slope = laws._bent(theta, x_MV, y_RM, floor, delta)
            for p in range(count):
                step = np.zeros_like(theta)
                step[0, p] = 1e-6
                up, down = (
                    laws._bent(theta + s, x_MV, y_RM, floor, delta, slopes=False)[0] for s in (step, -step)
                )
                assert slope[0, :, p] == pytest.approx((up - down)[0] / 2e-6, rel=1e-5, abs=1e-7)


def test_an_outlier_bends_the_fit_little():
    compute, losses = points(3, count=16, noise=0.003)
    clean = laws.fit_compute(compute, losses, floor=True, replicates=20)
    losses[8] *= 1.3
    bent = laws.fit_compute(compute, losses, floor=True, replicates=20)
    assert bent.coefficients["alpha"] == pytest.approx(clean.coefficients["alpha"], rel=0.15)
    assert abs(bent.residuals_M[8]) == pytest.approx(np.log(1.3), rel=0.1)


def test_the_floor_is_judged_by_aic():
    """It is worth its coefficient where there is one, and not where there is none."""
    compute, losses = points(1)
    with_E, without = (laws.fit_compute(compute, losses, floor=f, replicates=20) for f in (True, False))
    assert with_E.aicc < without.aicc and with_E.r2 > without.r2
    plain = 30 * compute**-0.3 * np.exp(0.01 * np.random.default_rng(5).standard_normal(len(compute)))
    with_E, without = (laws.fit_compute(compute, plain, floor=f, replicates=20) for f in (True, False))
    assert without.aicc < with_E.aicc and without.r2 > 0.99


def test_size_and_data_and_the_best_way_to_spend_compute():
    sizes, tokens = (a.ravel() for a in np.meshgrid(np.logspace(4, 7, 5), np.logspace(5, 8, 5)))
    losses = 1.7 + 400 * sizes**-0.34 + 410 * tokens**-0.28
    losses *= np.exp(0.001 * np.random.default_rng(0).standard_normal(len(losses)))
    law = laws.fit_size_and_data(sizes, tokens, losses, replicates=50)
    assert law.coefficients == pytest.approx(
        {"E": 1.7, "A": 400, "alpha": 0.34, "B": 410, "beta": 0.28}, rel=0.1
    )
    best = laws.optimal(law, 6e15)
    assert best.parameters * best.tokens == pytest.approx(1e15)
    for factor in (0.8, 1.25):
        assert law.loss(best.parameters * factor, best.tokens / factor)[0] > best.loss


def size_and_data(sizes, tokens, noise=0.002):
    """What members of a known law reach."""
    sizes, tokens = np.asarray(sizes, float), np.asarray(tokens, float)
    losses = 1.7 + 400 * sizes**-0.34 + 410 * tokens**-0.28
    return sizes, tokens, losses * np.exp(noise * np.random.default_rng(0).standard_normal(len(sizes)))


@pytest.mark.parametrize("count", [3, 5])
def test_members_that_tell_a_law_of_size_and_data_are_known_by_it(count):
    grid = np.meshgrid(np.logspace(4, 7, count), np.logspace(5, 8, count))
    law = laws.fit_size_and_data(*size_and_data(*(a.ravel() for a in grid)), replicates=20)
    found = design.told(law)
    assert found.enough and found.within < 0.1
    assert law.coefficients["alpha"] == pytest.approx(0.34, rel=0.1)
    assert law.coefficients["beta"] == pytest.approx(0.28, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "tokens", "says"),
    [
        (
            np.logspace(4, 7, 10),
            np.logspace(5, 8, 10),
            # along D = 10 N size and data can change places: which exponent is told worse, rounding decides
            "of 10 sizes and 10 amounts of data leave (alpha|beta) open, and ± 50 %",
        ),
        (
            [1e4, 1e5] * 5,
            np.repeat(np.logspace(5, 8, 5), 2),
            "of 2 sizes and 5 amounts of data leave alpha open",
        ),
        (
            np.tile([1e4, 1.3e4, 1.7e4], 3),
            np.repeat([1e5, 1.3e5, 1.7e5], 3),
            "9 members of 3 sizes and 3 amounts",
        ),
    ],
    ids=["both grow together", "two sizes", "a narrow grid"],
)
def test_members_that_do_not_are_known_and_those_that_lack_would_do(sizes, tokens, says):
    """A law may fit them as well as can be and say nothing, exact as they are."""
    sizes, tokens, losses = size_and_data(sizes, tokens, noise=0.0)
    law = laws.fit_size_and_data(sizes, tokens, losses, replicates=20)
    assert law.r2 > 0.999 and not design.told(law).enough
    more = design.missing(sizes, tokens, design.SCATTER)
    said = design.why_not(sizes, tokens, law)
    assert (
        re.search(says, said) and f"train {len(more)} more, such as {more[0][0]:,.0f} parameters on" in said
    )
    whole = [np.concatenate([those, these]) for those, these in zip((sizes, tokens), zip(*more))]
    assert design.told(laws.fit_size_and_data(*size_and_data(*whole), replicates=20)).enough


def test_a_law_that_size_has_no_part_in_is_not_told_by_members_that_would_tell_another():
    sizes, tokens = (a.ravel() for a in np.meshgrid(np.logspace(4, 7, 4), np.logspace(5, 8, 4)))
    losses = (1.7 + 410 * tokens**-0.28) * np.exp(0.005 * np.random.default_rng(0).standard_normal(16))
    law = laws.fit_size_and_data(sizes, tokens, losses, replicates=20)
    assert not design.told(law).enough and not design.missing(sizes, tokens, design.SCATTER)
    said = design.why_not(sizes, tokens, law)
    assert re.search(
        "16 members .* leave alpha .* would tell a law of the usual exponents: train sizes, or", said
    )


def test_three_members_say_how_many_are_missing_and_which():
    sizes, tokens = [1e4, 1e5, 1e6], [1e5, 1e6, 1e7]
    more = design.missing(sizes, tokens, design.SCATTER)
    assert len(more) >= 3
    said = design.why_not(sizes, tokens, None)
    assert said.startswith(
        f"3 members of 3 sizes and 3 amounts of data are too few for five coefficients: by a law of the usual "
        f"exponents train {len(more)} more, such as"
    )
    assert said.count("parameters on") == min(len(more), design.NAMED)
    whole = [[*those, *these] for those, these in zip((sizes, tokens), zip(*more))]
    assert design.told(laws.fit_size_and_data(*size_and_data(*whole), replicates=20)).enough


def test_the_frontier_is_what_nothing_cheaper_beats():
    assert laws.frontier([1, 1, 2, 3, 4], [5, 4, 4.5, 3, 3]) == [1, 3]


@pytest.mark.parametrize(
    ("compute", "losses", "message"),
    [
        ([1, 2, 3], [3, 2, 1], r"3 coefficients \(E, A, alpha\) needs 4 points or more, and there are 3"),
        ([1, 2, 3, 4], [3, 2, 0, 1], "the loss of point 3 is 0, and a power law is fitted to logarithms"),
        ([1, 2, -3, 4], [3, 2, 1, 1], "the compute of point 3 is -3"),
        ([1, 2, 3, 4], [3, 2, float("nan"), 1], "the loss of point 3 is nan"),
        ([5, 5, 5, 5], [3, 2, 1, 1], "the points have 1 different values of compute"),
        ([1, 2, 3], [3, 2, 1, 1], "3 values of compute for 4 losses"),
    ],
)
def test_what_cannot_be_fitted_is_said(compute, losses, message):
    with pytest.raises(UserError, match=message):
        laws.fit_compute(compute, losses, floor=True)
