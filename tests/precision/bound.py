"""The bound on rounding from which every numeric tolerance of the tests comes.

The arithmetic. A dtype of p significant bits has the unit round-off u = 2^-p: an operation returns its exact result
times 1 + d, |d| <= u. A sum of n terms, in whatever order, rounds each term at most n times, so that it is off by at
most gamma_n = n u / (1 - n u) times the sum of the terms' sizes (Higham, Accuracy and Stability of Numerical
Algorithms, chapters 3 and 4). That happens where all roundings go one way. Where they don't, they add up like a
random walk: off by at most L sqrt(n) u with probability 1 - 2 exp(-L^2 / 2), though every rounding be as large as it
may and every partial sum as large as the whole (Higham and Mary, A New Approach to Probabilistic Rounding Error
Analysis, 2019). In a sum of equal terms the squares of the partial sums average a third of the whole's, and roundings
spread evenly over [-u, u] have a third of u^2: there L = 4 stands at 12 standard deviations, for terms added one
after the other, which is the worst order. So

    error of a sum of n terms <= growth(n) x u x sum of the terms' sizes,  growth(n) = min(n, 4 sqrt(n)).

The linear factor would let a lost term through: 20,011 u = 1.2e-3 of the sum in float32, where a term is 5e-5.

Stages compose by the worst case: an operation adds its own rounding to what the errors of its operands become in it
(|a| E_b + |b| E_a + E_a E_b in a product, exp(E) - 1 of the value in an exponential, ...). tests/precision/rules.py
has one rule an operation; tests/precision/analysis.py applies them while the definition runs in float64.

16 bits. Sums, norms, exponentials and scores (products of two inputs) are float32 in every implementation, whatever
the inputs are. What is computed, rather than given, may be rounded to the inputs' dtype where a product reads it, and
that product's result where it is written. Roundings of n terms are independent: 4 u times the root of the sum of the
terms' squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

# unit round-off: half the distance from 1 to the next number
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# half the distance between the smallest numbers
TINY = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
DEVIATIONS = 4.0  # L above


def growth(terms: Tensor | float) -> Tensor:
    """How many unit round-offs, of the sum of their sizes, a sum of so many terms may be off by."""
    n = torch.as_tensor(terms).double()
    return torch.minimum(n, DEVIATIONS * n.sqrt())
