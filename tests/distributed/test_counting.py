"""One process counts the dataset for all; where it refuses, all do and none waits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from gr.data import popularity
from gr.data.dataset import SequenceDataset
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from gr.processes import processes
from tests.distributed.group import in_group

ITEMS = 9


def made(path, items) -> str:
    writer = DatasetWriter(path, "made", block_rows=4)
    writer.add(Sequences.of(np.arange(10), np.arange(11) * 3, item=np.arange(30) % items))
    writer.finish(pa.table({"item_id": np.arange(ITEMS), "count": np.zeros(ITEMS, np.int64)}))
    return str(path)


def counted_by(sound: str, wrong: str) -> dict:
    counted, count = [], popularity.count
    popularity.count = lambda *given: (
        counted.append(1) or count(*given)
    )  # in this process, which ends with the test
    split = LeaveOneOut(LeaveOneOut.Config())
    with processes("cpu", threads=1) as joined:
        catalogue = SequenceDataset(sound).catalogue.under(split)
        found = catalogue.count_once(joined)
        told = {
            "counts": catalogue.training_counts.tolist(),
            "users": found.users,
            "targets": found.targets,
            "counted": len(counted),
        }
        try:
            SequenceDataset(wrong).catalogue.under(split).count_once(joined)
        except UserError as error:
            told["refusal"] = str(error)
    return told


def test_one_of_three_processes_counts(tmp_path):
    sound, wrong = made(tmp_path / "sound", ITEMS), made(tmp_path / "wrong", ITEMS + 1)
    told = in_group(counted_by, 3, tmp_path / "group", sound, wrong, by_hand=False)
    assert [one.pop("counted") for one in told] == [1, 0, 0]
    assert told[0] == told[1] == told[2]
    expected = np.bincount(
        np.arange(0, 30, 3) % ITEMS, minlength=ITEMS
    )  # the first of three actions of each user
    assert told[0]["counts"] == expected.tolist() and told[0]["targets"] == {"valid": 10, "test": 10}
    assert told[0]["users"] == 0
    assert "has actions on items that its catalogue of 9 does not have" in told[0]["refusal"]
