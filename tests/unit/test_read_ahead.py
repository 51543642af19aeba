"""The thread that reads ahead ends with its reader."""

import subprocess
import sys
import threading
from itertools import count

import pytest

from gr.data.loader import read_ahead


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gr-read-ahead"]


def test_all_items_in_order_and_no_thread_left():
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))
    assert reading_threads() == []


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
