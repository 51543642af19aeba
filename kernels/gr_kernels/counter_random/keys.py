"""64-bit keys for counter-based generators, derived from a seed and a path of words."""

from __future__ import annotations

import hashlib

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64


def _splitmix64(state: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    z = (state + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _word_bits(word: int | str) -> int:
    if isinstance(word, str):
        # blake2b: the same on every machine and Python, unlike hash()
        return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
    if not isinstance(word, int):
        raise TypeError(f"derive_key takes integers and strings, got {type(word).__name__}: {word!r}")
    if not -(1 << 63) <= word < (1 << 64):
        raise ValueError(f"derive_key: the integer {word} does not fit in 64 bits")
    return word & _MASK64


def derive_key(seed: int, *words: int | str) -> int:
    """A 64-bit key for the stream named by ``words`` under ``seed``.

    ``derive_key(seed, "negatives", step)`` and ``derive_key(seed, "init", "items")`` are unrelated streams.
    The chain is ``state <- splitmix64(state xor splitmix64(word + tag))``; the tag keeps an integer apart
    from a string that hashes to it, and a chain of n words apart from its own prefix.

    Returns an int in [0, 2^64). Raises TypeError for other types, ValueError beyond 64 bits.
    """
    state = _splitmix64(_word_bits(seed))
    for word in words:
        tag = 0x5354520000000000 if isinstance(word, str) else 0x494E540000000000
        state = _splitmix64(state ^ _splitmix64((_word_bits(word) + tag) & _MASK64))
    return state
