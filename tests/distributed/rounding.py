"""How far two runs of a tiny dataset (tests/end_to_end/tiny.py) may be apart that add in another order.

The sums are over the targets of a batch, 16 users of up to 20 actions; a loss has at most twice the relative change of
the parameters (test_golden_losses.py).
"""

from __future__ import annotations

from tests.precision import after_steps

TERMS, CONDITION = 16 * 20, 2.0


def of_losses(steps: int, terms: float = TERMS) -> float:
    """Relative, of the losses of so many steps: both runs round."""
    return 2 * after_steps(steps, terms, CONDITION)


def of_weights(steps: int, size: float, terms: float = TERMS) -> float:
    """Absolute, of parameters that a step moves by a sum of terms whose sizes add up to ``size``."""
    return size * after_steps(steps, terms, CONDITION)


def adamw(rate: float) -> float:
    """The size of AdamW's terms. It moves a parameter by up to the rate times its gradient over the gradient's own
    size: by the rate times the gradient's relative error more or less, which grows where the terms cancel. They do so
    down to 1 / 200 of their sizes here."""
    return 200 * rate


def sgd(rate: float) -> float:
    """The size of SGD's terms: of the mean over a batch of gradients whose parts are below 1."""
    return rate
