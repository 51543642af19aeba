"""The processes of an attempt find each other in a store that remembers earlier ones."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from gr.processes import _agreed

RANKS = 3


def meet(store: dist.Store, late: int) -> list[str]:
    """The word of each rank in an attempt to which rank ``late`` comes last."""

    def come(rank: int) -> str:
        time.sleep(0.1 * (rank == late))
        return _agreed(store, rank, RANKS)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(come, range(RANKS)))


def test_each_attempt_has_a_word_of_its_own_whoever_comes_last():
    store = dist.HashStore()
    words = [meet(store, late) for late in (0, 1, 2, 0)]
    assert all(len(set(of_attempt)) == 1 for of_attempt in words)
    assert len({of_attempt[0] for of_attempt in words}) == 4


def test_what_an_attempt_that_nobody_finished_has_left_is_nothing():
    store = dist.HashStore()
    store.set("word", "old")
    store.set("old/1", "somebody")
    store.set("old/all", "somebody else")
    assert len(set(meet(store, 0))) == 1
