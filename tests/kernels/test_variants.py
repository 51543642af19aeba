"""No Triton kernel is compiled again because a batch has another number of actions or sequences: see variants.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_one_variant_for_batches_of_every_size(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("variants.py"))],
        env={**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["launched"]) >= {
        *("partial_sums", "table_gradient", "own_negatives", "row_gradient"),
        *("concat_part", "split_part", "to_dense", "to_jagged", "add_rows", "drop"),
    }
    again = found["compiled again"]
    # into how many parts, a power of two, long sums are cut: a few variants in all
    assert again.pop("positions", {}) in ({}, {"sum_rows_by_entry": ["SPLITS"]})
    assert again == {}
