"""Facts of a dataset against counting by hand, and the program's output."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from gr.data.dataset import SequenceDataset
from gr.data.describe import describe, plot, samples, titles
from gr.data.describe_tables import counts_table
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.errors import UserError


@pytest.fixture
def dataset(tmp_path) -> SequenceDataset:
    """Three users over two blocks, with ties, repeats, a user whose times go back, and a wrong count."""
    sequences = [[(0, 5), (1, 5), (0, 5), (2, 9)], [(1, 7)], [(0, 4), (3, 2), (3, 2)]]
    writer = DatasetWriter(tmp_path / "data", "small", block_rows=2)
    flat = [action for sequence in sequences for action in sequence]
    writer.add(
        Sequences.of(
            np.array([11, 12, 13]),
            np.array([0, 4, 5, 8]),
            item=np.array([item for item, _ in flat], dtype=np.int32),
            time=np.array([time for _, time in flat]),
        )
    )
    catalogue = {
        "item_id": [7, 8, 9, 10, 11],
        "count": [3, 2, 1, 1, 0],
        "title": ["A [b]", None, "C", "D", "E"],
    }
    return writer.finish(pa.table(catalogue))


def test_facts(dataset):
    found = describe(dataset)
    assert found.lengths.tolist() == [0, 1, 0, 1, 1]
    assert found.counts_I.tolist() == [3, 2, 1, 2, 0]
    assert (found.first_time, found.last_time) == (2, 9)
    h = found.health
    assert (h.empty, h.single, h.short, h.unseen_items, h.miscounted_items, h.out_of_range) == (
        0,
        1,
        0,
        1,
        1,
        0,
    )
    assert (h.pairs, h.ties, h.last_ties, h.unsorted) == (5, 3, 1, 1)
    assert (h.repeated_items, h.repeats) == (2, 2)
    assert found.length_histogram() == [(1, 1, 1), (2, 3, 1), (4, 7, 1)]
    assert found.length_quantiles((0, 0.5, 1)) == [1, 3, 4]
    assert found.popular(3) == [0, 1, 3] and found.share_of_top(0.2) == 3 / 8
    assert titles(dataset, [0, 1]) == ["A [b]", "8"]
    assert samples(dataset, 2).users_R.tolist() == [11, 13] and len(samples(dataset, 9)) == 3


def test_figure(dataset, tmp_path):
    for name in ("figure.png", "new/figure.svg"):
        plot(dataset, describe(dataset), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(UserError, match=r"cannot save a figure as 'f.docx': end it in .png, .svg or .pdf"):
        plot(dataset, describe(dataset), tmp_path / "f.docx")


def test_program(dataset, tmp_path, checkout):
    command = [sys.executable, str(checkout / "launch" / "describe.py")]
    done = subprocess.run(
        [*command, str(dataset.path), "--plot", str(tmp_path / "f.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in ("small", "A [b]", "1970-01-01 00:00:09", dataset.manifest.fingerprint, "broken"):
        assert text in done.stdout, text
    assert (tmp_path / "f.png").is_file()
    wrong = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: no sequence dataset at '{tmp_path}'")
    assert "Traceback" not in wrong.stderr


def test_times_in_another_unit_are_doubted(dataset):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(counts_table(dataset, describe(dataset)))  # times 2 to 9: January 1970
    assert "is the schema's time_unit right?" in console.export_text()
