"""What is said before the work about times and ids that are probably not what the schema says, and what is not."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from gr.data.describe import describe
from gr.data.describe_tables import counts_table, health_table, remarks_tables
from gr.data.making.log import LogReader
from gr.data.making.schema import LogSchema
from tests.unit.logs_common import COLUMNS, NOW, make, write, write_text

SECONDS = [NOW + 37 * n for n in range(40)]


def doubts_before(source, **schema) -> list[str]:
    """What is said before a row has been read."""
    reader = LogReader(str(source), LogSchema.model_validate({"columns": COLUMNS, **schema}))
    said = reader.remarks()
    assert reader.rows_read == 0 and reader.remarks() == []
    return said


@pytest.mark.parametrize(
    ("declared", "real", "scale"),
    [
        ("ms", "s", 1),
        ("us", "ms", 10**3),
        ("ns", "us", 10**6),
        ("ns", "s", 1),
        ("us", "s", 1),
        ("ns", "ms", 10**3),
    ],
)
def test_a_unit_finer_than_the_data(tmp_path, declared, real, scale):
    log = write(tmp_path, t=[s * scale for s in SECONDS])
    [said] = doubts_before(log, time_unit=declared)
    assert said.startswith(f"column 't': the sampled times, of '{log}', lie from 1970-01-") and (
        f"by time_unit '{declared}'; the last would be 2023-11-14 22:37:23 in {real}: set time_unit: {real} if"
        in said
    )
    made = make(log, tmp_path / "out", time_unit=declared)
    assert made.said == [said] and made.facts["doubts"] == [said.replace("sampled ", "")]
    assert make(log, tmp_path / "out", time_unit=real).said == []


def test_units_of_other_forms(tmp_path):
    typed = write(tmp_path, t=pa.array(SECONDS, pa.timestamp("ms")))
    said = doubts_before(typed)
    assert "by timestamps in ms; the last would be 2023" in said[1]
    assert "write the column as integers with time_unit: s if that is it" in said[1]
    text = write_text(tmp_path, "u,i,t\n" + "".join(f"1,2,{s}\n" for s in SECONDS))
    assert "set time_unit: s if that is it" in doubts_before(text, time_unit="ms")[0]
    days = write(tmp_path, t=[20240131, 20231105, 20240301])
    assert doubts_before(days) == [
        "column 't': 20231105 and the other sampled times look like dates written as numbers: write them as text like "
        "2023-11-05 with time_unit: iso"
    ]


def test_one_file_among_many_in_another_unit(tmp_path):
    """More files than are sampled: their statistics tell."""
    for n in range(30):
        scale = 1 if n == 11 else 1000
        write(tmp_path / "log", f"part-{n}.parquet", t=[s * scale for s in SECONDS])
    [said] = doubts_before(tmp_path / "log", time_unit="ms")
    assert f"40 sampled times, of '{tmp_path}/log/part-11.parquet', lie from 1970-01-20" in said
    pq.write_table(
        pa.table({"u": [1], "i": [1], "t": [NOW]}),
        tmp_path / "log" / "part-11.parquet",
        write_statistics=False,
    )
    assert doubts_before(tmp_path / "log", time_unit="ms") == []
    made = make(tmp_path / "log", tmp_path / "out", time_unit="ms")  # found on reading, said before sorting
    assert len(made.said) == 1 and f"1 times, of '{tmp_path}/log/part-11.parquet'" in made.said[0]


@pytest.mark.parametrize("sentinel", [0, -1, 2**31 - 1])
@pytest.mark.parametrize("kind", [pa.int64(), pa.timestamp("s"), pa.float64()])
def test_numbers_for_unknown_times(tmp_path, sentinel, kind):
    log = write(tmp_path, t=pa.array([sentinel, sentinel, *SECONDS], kind))
    said = doubts_before(log, earliest="1900-01-01")[-1]
    assert said.startswith(f"column 't': 2 of the sampled times: {sentinel} (")
    assert f"set unknown_times: [{sentinel}] to make them bad rows" in said
    made = make(
        log, tmp_path / "out", earliest="1900-01-01", unknown_times=[sentinel], on_bad_rows="quarantine"
    )
    assert made.facts["doubts"] == [] and made.dataset.actions == 40


def test_zeros_after_the_sample_are_counted(tmp_path):
    log = write(tmp_path, t=[*(NOW + n for n in range(5000)), 0, 0, 0])
    assert doubts_before(log) == []
    made = make(log, tmp_path / "out")
    assert len(made.said) == 1 and made.said == made.facts["doubts"]
    assert made.said[0].startswith("column 't': 3 of the times: 0 (1970-01-01 00:00:00)")


@pytest.mark.parametrize(
    "values",
    [
        np.array(SECONDS, np.float32).astype(np.int64),
        np.array(SECONDS, np.float32).astype(np.float64),
        [str(int(s)) for s in np.array(SECONDS, np.float32)],
        np.array(SECONDS, np.float32)[:12].astype(np.int64),
    ],
)
def test_times_that_went_through_a_float32(tmp_path, values):
    [said] = doubts_before(write(tmp_path, t=values))
    assert said.startswith(
        "column 't': all sampled times are multiples of 128 s, as if they had gone through floats"
    )


def test_ids_that_went_through_floats(tmp_path):
    ids = np.random.default_rng(0).integers(2**60, 2**61, 50)
    assert doubts_before(write(tmp_path, i=ids)) == []
    [said] = doubts_before(write(tmp_path, i=ids.astype(np.float64).astype(np.int64)))
    assert "all 50 sampled ids of 2^53 or more are numbers that a float64 can hold" in said
    ids = np.random.default_rng(0).integers(2**26, 2**27, 50)
    assert doubts_before(write(tmp_path, i=ids)) == []
    [said] = doubts_before(write(tmp_path, i=ids.astype(np.float32).astype(np.int64)))
    assert "of 2^24 or more are numbers that a float32 can hold" in said


def test_words_that_stand_for_nothing(tmp_path):
    said = doubts_before(write(tmp_path, u=["nan", "b"], i=["x", "\\N"]))
    assert [s.split(":")[0] for s in said] == ["column 'u'", "column 'i'"] and "'nan' is an id" in said[0]
    [said] = doubts_before(write_text(tmp_path, "u,i,t\n1.0,5,1\n2.0,6,2\n"))
    assert said.startswith("column 'u': '1.0' is read as text, another id than '1'")


@pytest.mark.parametrize(
    "columns",
    [
        {"t": [0, 1, 2]},  # a clock of its own
        {"t": [10**6 * n for n in range(3)]},
        {"t": [NOW // 86_400 * 86_400 + 86_400 * n for n in range(40)]},  # days are multiples of 128 s
        {"t": [3600 * (NOW // 3600 + 2 * n) for n in range(40)]},
        {"t": [64 * n for n in range(40)]},
        {"t": [float(s) for s in SECONDS]},
        {"i": [2**40 + n for n in range(40)]},
        {"i": [f"A-{n}" for n in range(3)], "u": ["007", "1e3", "12.5"]},
        {"i": ["(live)", "plain", "[x]"]},
    ],
)
def test_ordinary_logs_are_read_without_a_word(tmp_path, columns):
    assert doubts_before(write(tmp_path, **columns)) == []
    assert make(write(tmp_path, **columns), tmp_path / "out").facts["doubts"] == []


def shown(*tables) -> str:
    console = Console(width=400, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_describe_shows_doubts(tmp_path):
    wrong = make(write(tmp_path, t=SECONDS), tmp_path / "out", time_unit="ms").dataset
    found = describe(wrong)
    text = shown(counts_table(wrong, found), *remarks_tables(wrong))
    assert (
        "is the schema's time_unit right? In a unit 1,000 times as long they would end at 2023-11-14" in text
    )
    assert "doubt" in text and "set time_unit: s if that is it" in text
    zeros = make(write(tmp_path, t=[0, 0, 5000, *SECONDS]), tmp_path / "out").dataset
    found = describe(zeros)
    assert (found.health.epoch, found.health.early) == (2, 1) and found.unit_doubt() == ""
    text = shown(health_table(zeros, found), *remarks_tables(zeros))
    assert "often an unknown time: set unknown_times" in text and "2 of the times: 0 (1970-01-01" in text
    own = make(write(tmp_path, t=[0, 1, 2]), tmp_path / "out").dataset
    found = describe(own)
    assert (found.health.epoch, found.health.early) == (0, 0)
    assert found.unit_doubt() == "is the schema's time_unit right?" and remarks_tables(own) == []
