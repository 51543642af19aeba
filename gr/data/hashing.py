"""Stable 64-bit hashes of ids and seeds: the same on every machine, process and version."""

from __future__ import annotations

import hashlib

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of uint64 whose bits all depend on all."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """hash64 of raw ids, uint64: integers through :func:`mix64`, anything else as UTF-8 text through BLAKE2b."""
    if np.issubdtype(ids.dtype, np.integer):
        return mix64(ids.astype(np.int64).view(np.uint64))
    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "little")
            for i in ids.tolist()
        ),
        dtype=np.uint64,
        count=len(ids),
    )


def keyed(numbers: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """64 random bits for each number, uint64, that hang on it and on ``key`` alone."""
    return mix64(numbers.astype(np.uint64) ^ mix64(np.atleast_1d(np.asarray(key, np.uint64))))


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), never 0 or 1, of random bits."""
    return ((bits >> np.uint64(11)) + 0.5) * 2.0**-53


def derive(*words: object) -> int:
    """A 64-bit key from words (seed, epoch, names ...)."""
    text = "\x1f".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
