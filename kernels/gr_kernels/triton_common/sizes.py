"""Sizes that Triton's tiles can have."""

from __future__ import annotations


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()
