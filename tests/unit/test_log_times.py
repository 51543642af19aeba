"""Times are never bent: nothing wraps, nothing that stands for 'unknown' becomes a time, zones are one or said."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from tests.unit.logs_common import ASIDE, NOW, make, refusal, write, write_text

ASIDE_TOO = {"on_bad_rows": "quarantine"}
GOOD = dt.datetime(2024, 1, 1)
SENTINELS = [GOOD, dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1), dt.datetime(2024, 1, 2, 3, 4, 5, 678901)]
LATE, EARLY = "t: is not before 2200-01-01", "t: is before 1970-01-01"


@pytest.mark.parametrize("int96", [False, True])
def test_sentinel_timestamps_are_bad_rows(tmp_path, int96):
    log = write(tmp_path, t=pa.array(SENTINELS, pa.timestamp("us")), int96=int96)
    assert refusal(log, tmp_path / "out") == (
        f"'{log}', row group 0, row 1, column 't': '9999-12-31 00:00:00.000000' is not before 2200-01-01; "
        f"set latest if such times are meant, {ASIDE}"
    )
    made = make(log, tmp_path / "out", **ASIDE_TOO)
    assert made.rows == {1: [(1, 1704067200), (4, 1704164645)]}
    assert made.quarantined == {LATE: 1, EARLY: 1}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**62, -(2**62)], pa.timestamp("ms")),
        pa.array([0, 2**63 - 1, -(2**63) + 1], pa.timestamp("us")),
        pa.array([0, 2**63 - 1, -(2**63) + 1], pa.timestamp("ns")),
        pa.array([0, 2**62, -(2**62)], pa.timestamp("ms", "UTC")),
        pa.array([0, 2**31 - 1, -(2**31)], pa.date32()),
        pa.array([0, 86_400_000 * 10**6, -86_400_000 * 10**6], pa.date64()),
        pa.array([0, 2**63 - 1, -(2**63)], pa.int64()),
    ],
)
def test_extremes_of_every_type(tmp_path, column):
    made = make(write(tmp_path, t=column), tmp_path / "out", **ASIDE_TOO)
    assert made.rows == {1: [(1, 0)]}
    assert sorted(made.quarantined.values()) == [1, 1] and "missing" not in str(made.quarantined)


def test_a_coarse_unit_beside_a_fine_one_does_not_overflow(tmp_path):
    write(tmp_path / "log", "a.parquet", t=pa.array([0], pa.timestamp("ns")))
    write(tmp_path / "log", "b.parquet", t=pa.array(SENTINELS[:3], pa.timestamp("ms")))
    made = make(tmp_path / "log", tmp_path / "out", **ASIDE_TOO)
    assert made.rows == {1: [(1, 0), (1, 1704067200)]}
    assert made.quarantined == {"t: is beyond the years that ns in 64 bits reach": 2}


def test_text_out_of_range(tmp_path):
    log = write_text(
        tmp_path, "u,i,t\n1,1,2024-01-01\n1,2,9999-12-31\n1,3,0001-01-01 00:00:00\n1,4,1900-01-01\n"
    )
    made = make(log, tmp_path / "out", time_unit="iso", **ASIDE_TOO)
    assert made.rows == {1: [(1, 1704067200)]} and made.quarantined == {LATE: 1, EARLY: 2}


def test_bounds_are_options(tmp_path):
    log = write(
        tmp_path, t=pa.array([dt.datetime(1900, 1, 1), GOOD, dt.datetime(2300, 1, 1)], pa.timestamp("us"))
    )
    made = make(log, tmp_path / "out", earliest="1900-01-01", latest=dt.date(2301, 1, 1))
    assert [t for _, t in made.rows[1]] == [-2_208_988_800, 1_704_067_200, 10_413_792_000]
    assert "set earliest if such times are meant" in refusal(log, tmp_path / "no", latest="2301-01-01")
    assert "config key 'earliest' is 'soon': value error, a day is needed, such as 1970-01-01" in refusal(
        log, tmp_path / "no", earliest="soon"
    )


def test_a_number_in_a_finer_unit_names_it(tmp_path):
    for scale, unit in ((10**3, "ms"), (10**6, "us"), (10**9, "ns")):
        said = refusal(write(tmp_path, t=[NOW * scale]), tmp_path / "out")
        assert f"is not before 2200-01-01 in time_unit 's'; set time_unit: {unit} if it is 2023-11-14" in said
    said = refusal(write(tmp_path, t=[NOW * 1e3 + 0.5]), tmp_path / "out")  # with decimals
    assert "set time_unit: ms if it is 2023-11-14 22:13:20" in said
    said = refusal(write(tmp_path, t=[NOW]), tmp_path / "out", time_unit="ms", earliest="2000-01-01")
    assert "is before 2000-01-01 in time_unit 'ms'; set time_unit: s if it is 2023-11-14 22:13:20" in said
    said = refusal(write(tmp_path, t=[20240131123000]), tmp_path / "out")
    assert "write times as text like 2024-01-31T12:30:00 with time_unit: iso" in said


def test_floats_that_cannot_hold_the_times_are_refused(tmp_path):
    """Seconds since 1970 lie 128 s apart in 32 bits, nanoseconds 256 ns in 64."""
    log = write(tmp_path, t=np.array([NOW, NOW + 20], np.float32))
    assert refusal(log, tmp_path / "out") == (
        f"'{log}', row group 0, row 0, column 't': 1700000000.0 is a float32 of 2^24 or more, where neighbouring "
        f"integers are one number; write the column as integers or text, {ASIDE}"
    )
    log = write(tmp_path, t=[float(NOW * 10**9)])
    assert "is a float64 of 2^53 or more" in refusal(log, tmp_path / "out", time_unit="ns")
    log = write(tmp_path, t=pa.array(np.array([1, 4000], np.float16)))
    assert "4000.0 is a float16 of 2^11 or more" in refusal(log, tmp_path / "out")


def test_floats_that_can_are_read_to_the_digit(tmp_path):
    made = make(write(tmp_path, t=[NOW + 0.75, NOW + 0.25, NOW - 1.0]), tmp_path / "out")
    assert made.rows == {1: [(3, NOW - 1), (2, NOW), (1, NOW)]} and made.said == []
    made = make(write(tmp_path, t=[NOW * 1e3 + 5, NOW * 1e3 + 1]), tmp_path / "out", time_unit="ms")
    assert [i for i, _ in made.rows[1]] == [2, 1]
    made = make(write(tmp_path, t=pa.array([10.5, 3.25], pa.float32())), tmp_path / "out")
    assert made.rows == {1: [(2, 3), (1, 10)]}
    exact = pa.array([Decimal(f"{NOW}.250"), Decimal(f"{NOW}.125")])
    assert [i for i, _ in make(write(tmp_path, t=exact), tmp_path / "out").rows[1]] == [2, 1]


def test_one_file_with_decimals_is_enough(tmp_path):
    write(tmp_path / "log", "a.parquet", t=[NOW])
    write(tmp_path / "log", "b.parquet", t=[NOW + 0.5, NOW + 0.25])
    assert [i for i, _ in make(tmp_path / "log", tmp_path / "out").rows[1]] == [1, 2, 1]


def test_unknown_times_are_bad_rows_where_the_schema_says_so(tmp_path):
    for column in ([0, NOW, -1], pa.array([0, NOW, -1], pa.timestamp("s")), [0.0, NOW + 0.5, -1.0]):
        made = make(
            write(tmp_path, t=column),
            tmp_path / "out",
            unknown_times=[0, -1],
            earliest="1900-01-01",
            **ASIDE_TOO,
        )
        assert made.rows == {1: [(2, NOW)]}
        assert made.quarantined == {"t: stands for an unknown time (unknown_times)": 2}
    assert refusal(write(tmp_path, t=[NOW, -1]), tmp_path / "no").startswith(
        f"'{tmp_path}/log.parquet', row group 0, row 1, column 't': -1 is before 1970-01-01 in time_unit 's'; "
        "set earliest if such times are meant"
    )


def test_text_that_reads_as_a_number_of_another_base(tmp_path):
    log = write(tmp_path, t=["0x6553F100", str(NOW)])
    assert "'0x6553F100' is not a whole number of time_unit 's'" in refusal(log, tmp_path / "out")
    log = write(tmp_path, t=["2024-01-31", str(NOW)])
    assert "set time_unit: iso if times are text" in refusal(log, tmp_path / "out")
    made = make(write(tmp_path, t=["", str(NOW), "  "]), tmp_path / "out", **ASIDE_TOO)
    assert made.quarantined == {"t: missing": 2}


# -- zones -------------------------------------------------------------------------------------------------------------


def test_files_that_disagree_about_zones_are_refused(tmp_path):
    logs = tmp_path / "log"
    zoned = write(logs, "a.parquet", t=pa.array([NOW * 1000], pa.timestamp("ms", "Asia/Tokyo")))
    naive = write(logs, "b.parquet", t=pa.array([NOW * 1000], pa.timestamp("ms")))
    said = (
        f"'{naive}', column 't': times without a zone, while those of '{zoned}' have one; set time_zone to the zone of "
        "those without, such as UTC (Spark's INT96 is UTC)"
    )
    assert refusal(logs, tmp_path / "out") == said == refusal(logs, tmp_path / "out", **ASIDE_TOO)
    made = make(logs, tmp_path / "out", time_zone="Europe/Berlin")
    assert made.rows == {1: [(1, NOW - 3600), (1, NOW)]}
    assert made.facts["times"]["files_without_zones"] == [str(naive)]
    assert made.facts["times"]["files_with_zones"] == 1
    assert made.facts["times"]["zone_of_times_without"] == "Europe/Berlin"
    assert made.said == made.facts["assumptions"] == ["times without a zone are taken as Europe/Berlin"]
    write(logs, "b.parquet", t=pa.array([19_000], pa.date32()))
    assert "times without a zone" in refusal(logs, tmp_path / "no")


def test_files_of_different_zones_agree(tmp_path):
    for name, zone in (("a", "UTC"), ("b", "Asia/Tokyo")):
        write(tmp_path / "log", f"{name}.parquet", t=pa.array([NOW], pa.timestamp("s", zone)))
    made = make(tmp_path / "log", tmp_path / "out")
    assert made.rows == {1: [(1, NOW), (1, NOW)]} and made.said == made.facts["assumptions"] == []


def test_naive_files_say_what_is_assumed(tmp_path):
    made = make(write(tmp_path, t=pa.array([NOW], pa.timestamp("s"))), tmp_path / "out")
    assert made.said == made.facts["assumptions"] == ["times without a zone are taken as UTC"]
    assert made.facts["times"]["files_without_zones"] == 1


@pytest.mark.parametrize("chunk_rows", [1, 100])
def test_rows_of_text_that_disagree_about_zones(tmp_path, chunk_rows):
    text = (
        "u,i,t\n1,1,soon\n1,2,2024-01-01T00:00:00Z\n1,3,2024-01-01 00:00:00\n1,4,2024-01-01T02:00:00+01:00\n"
    )
    log = write_text(tmp_path, text)
    form = {"time_unit": "iso", "chunk_rows": chunk_rows}
    made = make(log, tmp_path / "out", **form, **ASIDE_TOO)
    assert made.rows == {1: [(2, 1704067200), (4, 1704070800)]}
    assert made.quarantined == {
        "t: is not a time like 2024-01-31T12:30:00": 1,
        "t: names no zone as the log's first times do": 1,
    }
    made = make(log, tmp_path / "out", time_zone="Asia/Tokyo", **form, **ASIDE_TOO)
    assert made.rows == {1: [(3, 1704067200 - 9 * 3600), (2, 1704067200), (4, 1704070800)]}
    log = write_text(tmp_path, "u,i,t\n1,3,2024-01-01 00:00:00\n1,2,2024-01-01T00:00:00Z\n")
    assert (
        "'2024-01-01T00:00:00Z' names its zone, which the log's first times don't; set time_zone"
        in refusal(log, tmp_path / "no", **form)
    )


def test_hours_that_clocks_skip_or_show_twice(tmp_path):
    text = "u,i,t\n1,1,2024-03-31 02:30:00\n1,2,2024-10-27 02:30:00\n1,3,9999-12-31\n"
    form = {"time_unit": "iso", "time_zone": "Europe/Berlin"}
    made = make(write_text(tmp_path, text), tmp_path / "out", **form, **ASIDE_TOO)
    assert made.rows == {1: [(2, 1_729_989_000)]}  # 00:30 UTC, in summer time
    assert made.quarantined == {LATE: 1, "t: is skipped by the clocks of time_zone 'Europe/Berlin'": 1}


def test_a_zone_without_effect_or_name_is_refused(tmp_path):
    log = write(tmp_path, t=[NOW])
    assert refusal(log, tmp_path / "out", time_zone="UTC") == (
        "time_zone is 'UTC', but times in time_unit 's' count from 1970 in UTC: leave time_zone out"
    )
    for name in ("Europe/Berlni", "../etc", ""):
        assert "no time zone of that name is known" in refusal(log, tmp_path / "out", time_zone=name)
