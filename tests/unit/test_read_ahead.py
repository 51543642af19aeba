"""The thread that reads ahead ends with its reader."""

import subprocess
import sys
import threading
import time
from itertools import count

import pytest

from gr.data.loader import read_ahead


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gr-read-ahead"]


def test_all_items_in_order_and_no_thread_left():
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))
    assert reading_threads() == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_item_comes_once_and_in_order_whoever_makes_it(depth):
    spins = [(n * 7919) % 13 * 50 for n in range(2000)]

    def items():
        for n, spin in enumerate(spins):
            sum(range(spin))
            yield n

    received = []
    for n in read_ahead(items(), depth):
        received.append(n)
        sum(range(spins[-n - 1]))
    assert received == list(range(2000)) and reading_threads() == []


def made_by():
    """Items that are the names of the threads that made them, and what tells that the third was made."""
    third = threading.Event()

    def items():
        for n in range(6):
            if n == 2:
                third.set()
            yield threading.current_thread().name

    return items(), third


def test_who_waits_for_an_item_makes_it():
    items, _ = made_by()
    assert set(read_ahead(items, 0)) == {threading.current_thread().name}


def test_the_thread_makes_items_while_nobody_asks():
    items, third = made_by()
    received = read_ahead(items, 2)
    next(received)
    assert third.wait(60)
    assert [next(received), next(received)] == ["gr-read-ahead"] * 2
    assert len(list(received)) == 3


@pytest.mark.parametrize("away_s, least, most", [(0.0, 0, 20), (0.004, 150, 200)])
def test_a_reader_that_comes_back_at_once_makes_its_items_itself(away_s, least, most):
    def items():
        for _ in range(200):
            time.sleep(0.002)
            yield threading.current_thread().name

    by_the_thread = 0
    for name in read_ahead(items(), 2):
        by_the_thread += name == "gr-read-ahead"
        if away_s:
            time.sleep(away_s)
    assert least <= by_the_thread <= most


def test_leaving_early_ends_the_thread():
    items = read_ahead(count(), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert reading_threads() == []


def test_an_error_of_the_thread_is_raised_at_its_place():
    def items():
        yield 1
        raise ValueError("broken block")

    received = read_ahead(items(), 2)
    assert next(received) == 1
    with pytest.raises(ValueError, match="broken block"):
        next(received)
    assert reading_threads() == []


def test_a_process_that_still_holds_its_reader_ends_cleanly():
    program = """
import torch
from gr.data.loader import read_ahead

def busy():
    while True:
        for _ in range(1000):
            torch.arange(1000).cumsum(0)
        yield 0

items = read_ahead(busy(), 2)
next(items)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
