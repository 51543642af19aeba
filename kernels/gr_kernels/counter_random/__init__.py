"""Counter-based random numbers (Philox4x32-10): see README.md."""

from gr_kernels.counter_random.keys import derive_key
from gr_kernels.counter_random.op import truncated_normal_rows, uniform_floats, uniform_integers
from gr_kernels.counter_random.reference import philox

__all__ = ["derive_key", "philox", "truncated_normal_rows", "uniform_floats", "uniform_integers"]
