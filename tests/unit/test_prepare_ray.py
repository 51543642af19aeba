"""Preparing on a real Ray cluster: equal to preparing in one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.cluster import import_ray
from gr.data.columns import to_table
from gr.data.making import ids, in_process, log, on_ray, partitions, ray_steps
from gr.data.making.engine import Engine
from gr.data.making.ids import IdCodes, union
from gr.data.making.partitions import whole
from gr.data.making.ray_steps import shares
from gr.data.making.sources.base import make_source
from gr.data.making.times import FileTimes
from gr.data.sequences import Sequences
from gr.errors import UserError
from gr.progress import Progress, Stage
from tests.packages import needs
from tests.unit import ray_logs
from tests.unit.logs_common import COLUMNS, NOW, Notes, write, write_text
from tests.unit.test_prepare import COLUMNS as ALL_COLUMNS, random_log, write_parquet

needs("ray", "pandas")
RAY = Engine("ray")


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """A cluster of this session."""
    from gr.data.cluster import joined

    with joined(cpus=2, store_mib=200) as ray:
        yield ray


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(log, "PART_ROWS", 150)


def made(source: Any, out: Path, engine: Engine, name: str = "log", **options: Any) -> dict[str, Any]:
    """All that a dataset is, and what was said; or the error."""
    notes = Notes()
    try:
        dataset = make_source(name, options).prepare(
            str(source), str(out), overwrite=True, progress=notes, engine=engine
        )
    except UserError as error:
        return {"error": str(error).replace(str(out), "OUT")}
    finally:
        left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
        assert left == []
    aside = out / "quarantine"
    return {
        "manifest": json.loads((out / "manifest.json").read_text()) | {"name": ""},
        "catalogue": dataset.catalogue.to_pydict(),
        "quarantine": pq.read_table(aside).to_pylist() if aside.exists() else None,
        "sequences": [pq.read_table(p) for p in sorted((out / "sequences").iterdir())],
        "said": notes.said,
    }


def both(source: Any, tmp_path: Path, name: str = "log", **options: Any) -> dict[str, Any]:
    """What both engines make, after a comparison of all of it."""
    one = made(source, tmp_path / "one", Engine(), name, **options)
    other = made(source, tmp_path / "other", RAY, name, **options)
    assert other == one
    return other


# -- equal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_with_everything_on(ray, tmp_path, small_parts, text):
    """Text and integers, repeats, a core, a cap, listed items, rows put aside; blocks that cross partitions."""
    source = write_parquet(tmp_path / "log", random_log(4, text, actions=900), files=5, row_group=70)
    bad = {
        "u": ["u1", None],
        "i": ["i", "j"],
        "t": [1, None],
        "v": [1.0, 2.0],
        "a": ["view", "b"],
        "d": ["x", "y"],
    }
    if not text:
        bad |= {"u": [1, None], "i": [2, 3]}
    pq.write_table(pa.table(bad), tmp_path / "log" / "part-002b.parquet")
    listed = {"id": ["i6", "never", "i19"] if text else [6, 10**9, 19], "title": ["six", "", None]}
    pq.write_table(pa.table(listed), tmp_path / "items.parquet")
    options = {
        "columns": ALL_COLUMNS,
        "on_bad_rows": "quarantine",
        "duplicates": "drop_exact",
        "max_user_actions": 20,
        "items": "listed",
        "catalogue": {"path": str(tmp_path / "items.parquet"), "item": "id"},
        "filter": {"min_item_count": 25, "min_user_count": 6, "mode": "core", "min_length": 7},
        "chunk_rows": 64,
        "partitions": 8,
    }
    found = both(source, tmp_path, **options)
    provenance = found["manifest"]["provenance"]
    assert [s["stage"] for s in provenance["stages"]] == [
        "rows of the log", "quarantined", "read", "latest of each user", "duplicates dropped", "minimum counts",
        "minimum length", "dataset",
    ]  # fmt: skip
    assert provenance["capped"]["users"] and sum(provenance["quarantined"].values()) == 1
    assert found["quarantine"][0]["row"] == 1
    assert max(found["catalogue"]["item_id"]) == ("never" if text else 10**9)


def test_many_users(ray, tmp_path):
    """Blocks cross partitions, and the second file of the dataset begins in the middle of one."""
    r = np.random.default_rng(0)
    users = np.concatenate([np.arange(270_000), r.integers(0, 270_000, 30_000)])
    write(tmp_path / "log", u=users, i=r.integers(0, 900, len(users)), t=r.integers(0, 99, len(users)))
    found = both(tmp_path / "log", tmp_path, columns=COLUMNS, partitions=4)
    assert [len(t) for t in found["sequences"]] == [2**18, 270_000 - 2**18]


ZONES = "2024-01-01T00:00:00Z"


def odd_logs(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, source, options)."""
    lists = folder / "files"
    for n, items in enumerate(([5, 3], [9], [], [3, 1])):
        write(lists, f"part-{n}.parquet", u=[1] * len(items), i=pa.array(items, pa.int64()), t=None)
    yield "no times", lists, {"columns": {"user": "u", "item": "i"}, "partitions": 4}
    hive = folder / "hive"
    for day in (1, 2, 3):
        write_text(hive, f"u,i,t\n1,2,{NOW + day}\n7,7\n{day},x,{NOW}\n", f"dt=2024-01-0{day}/a.csv")
    fields = {"columns": {**COLUMNS, "fields": {"day": "dt"}}, "on_bad_rows": "quarantine"}
    yield "csv in folders", hive, {**fields, "item_ids": "integer"}
    zones = folder / "zones"  # the first time of all decides what others must be
    write_text(zones, f"u,i,t\n1,1,nothing\n1,2,{ZONES}\n", "a.csv")
    write_text(zones, "u,i,t\n2,1,2024-01-01T00:00:01\n2,2,2024-01-02T00:00:00Z\n", "b.csv")
    yield "zones", zones, {"columns": COLUMNS, "time_unit": "iso", "on_bad_rows": "quarantine"}
    early = folder / "early"
    for n in range(6):
        times = [(NOW + k) * (1 if n == 3 else 1000) for k in range(40)]
        write(early, f"p{n}.parquet", t=[*times, 0], i=[2**24 + 1] * 41, v=[2**24 + 1] * 41)
    yield "doubts", early, {"columns": {**COLUMNS, "value": "v"}, "time_unit": "ms"}
    yield "once", early, {"columns": COLUMNS, "time_unit": "ms", "filter": {"min_user_count": 2}}
    late = folder / "late"
    for n in range(6):
        write(late, f"p{n}.parquet", u=pa.array([1, None if n in (3, 5) else 2, 3]))
    yield "refused", late, {"columns": COLUMNS}
    nothing = folder / "nothing"
    write(nothing, u=pa.array([None, None], pa.int64()))
    yield "nothing", nothing, {"columns": COLUMNS, "on_bad_rows": "quarantine"}
    empty = folder / "empty"
    write(empty, u=pa.array([], pa.int64()), i=pa.array([], pa.int64()), t=pa.array([], pa.int64()))
    yield "empty", empty, {"columns": COLUMNS}
    yield "all filtered", lists, {"columns": {"user": "u", "item": "i"}, "filter": {"min_length": 50}}


def test_odd_logs(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "PART_ROWS", 1)  # each file is a part
    found = {}
    for name, source, options in odd_logs(tmp_path / "logs"):
        found[name] = both(source, tmp_path, **options)
    assert found["zones"]["manifest"]["provenance"]["quarantined"] == {
        "t: is not a time like 2024-01-31T12:30:00": 1,
        "t: names no zone as the log's first times do": 1,
    }
    assert len(found["doubts"]["manifest"]["provenance"]["doubts"]) == 3
    assert f"'{tmp_path}/logs/late/p3.parquet', row group 0, row 1, column 'u'" in found["refused"]["error"]
    assert "has no valid action (2 x u: missing)" in found["nothing"]["error"]
    assert "has no valid action (it is empty)" in found["empty"]["error"]
    assert "no sequence is left to write" in found["all filtered"]["error"]


def test_published_sources(ray, tmp_path):
    (tmp_path / "sequences.txt").write_text("7 9 8 9\n3 8\n11 8 9\n")
    assert both(tmp_path, tmp_path, "amazon-beauty")["catalogue"] == {"item_id": [8, 9], "count": [3, 3]}
    with pytest.raises(
        UserError, match="synthetic-dp is generated by one process, not on ray: leave --engine out"
    ):
        make_source("synthetic-dp").prepare(None, str(tmp_path / "dp"), engine=RAY)


# -- deaths ------------------------------------------------------------------------------------------------------------


class Watching(Progress):
    """Remembers when each part of the log was done, as it is when a stage begins."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.seen = folder, [], {}

    @contextmanager
    def stage(self, name: str, total=None, unit="actions", done=0) -> Iterator[Stage]:
        self.seen[name] = written(self.folder)
        yield Stage()

    def note(self, text: str) -> None:
        self.said.append(text)


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Parts of the log that are done, with inode and time of what each left."""
    results = {p.parent.name: p.stat() for p in folder.glob("read/[0-9]*/result.json")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in results.items()}


def test_a_killed_worker_changes_nothing(ray, tmp_path, small_parts, monkeypatch):
    source = write_parquet(tmp_path / "log", random_log(1, text=True), row_group=100)
    options = {"columns": ALL_COLUMNS, "partitions": 4}
    one = made(source, tmp_path / "one", Engine(), **options)
    monkeypatch.setattr(on_ray, "ReadPart", ray_logs.Killed)
    assert made(source, tmp_path / "other", RAY, **options) == one
    assert (tmp_path / "was-killed").exists()


DRIVER = """
import sys
from gr.data.making import log
from gr.data.making.engine import Engine
from gr.data.making.sources.base import make_source
log.PART_ROWS = 100
source, out, address = sys.argv[1:]
options = {"columns": {"user": "u", "item": "i", "time": "t"}, "partitions": 4}
make_source("log", options).prepare(source, out, engine=Engine("ray", address, 1))
"""


def test_a_killed_driver_goes_on_where_it_was(ray, tmp_path, monkeypatch):
    """Finished parts are read no second time; a changed log is begun anew; two at a time are refused."""
    r = np.random.default_rng(3)
    rows = 4000
    table = pa.table(
        {"u": r.integers(0, 90, rows), "i": r.integers(0, 50, rows), "t": r.integers(0, 9, rows)}
    )
    source, out = tmp_path / "log.parquet", tmp_path / "out"
    pq.write_table(table, source, row_group_size=100)
    scratch = tmp_path / ".out.preparing"
    monkeypatch.setattr(log, "PART_ROWS", 100)
    options = {"columns": COLUMNS, "partitions": 4}

    def killed() -> dict[str, tuple[int, int]]:
        """What there is when a process was killed that had read three parts."""
        address = ray.get_runtime_context().gcs_address
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(source), str(out), address])
        try:
            end = time.monotonic() + 60
            while len(written(scratch)) < 3:
                assert driver.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            with pytest.raises(UserError, match="is being prepared by another process"):
                make_source("log", options).prepare(str(source), str(out), engine=RAY)
        finally:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
        assert not out.exists()
        return written(scratch)

    before = killed()
    assert 3 <= len(before) < 40
    watching = Watching(scratch)
    dataset = make_source("log", options).prepare(str(source), str(out), progress=watching, engine=RAY)
    after = watching.seen["writing"]
    assert len(after) == 40 and {name: after[name] for name in before} == before
    [said] = watching.said
    assert said.startswith(f"going on with what was begun in '{scratch}': ")
    one = make_source("log", options).prepare(str(source), str(tmp_path / "one"))
    assert dataset.manifest.generation == one.manifest.generation
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.parquet", "one", "out"]

    out.rename(tmp_path / "first")
    killed()
    pq.write_table(table.slice(1), source, row_group_size=100)
    watching = Watching(scratch)
    dataset = make_source("log", options).prepare(str(source), str(out), progress=watching, engine=RAY)
    assert watching.said == [f"'{scratch}' is of another log or of other options: begun anew"]
    assert dataset.actions == rows - 1 and watching.seen["reading"] == {}


def test_a_full_disk_is_one_sentence(ray, tmp_path, small_parts, monkeypatch):
    source = write_parquet(tmp_path / "log", random_log(2, text=False), row_group=100)
    options = {"columns": ALL_COLUMNS, "partitions": 2, "scratch": str(tmp_path / "scratch")}
    full = f"no space is left on the disk for '{tmp_path / 'out'}' and its partitions (20 bytes an action"
    monkeypatch.setattr(on_ray, "ReadPart", ray_logs.Full)
    with pytest.raises(UserError) as error:
        make_source("log", options).prepare(source, str(tmp_path / "out"), engine=RAY)
    assert str(error.value).startswith(full) and str(error.value).endswith(
        "the same command goes on from here"
    )
    monkeypatch.setattr(on_ray, "ReadPart", ray_steps.ReadPart)
    notes = Notes()
    make_source("log", options).prepare(source, str(tmp_path / "out"), progress=notes, engine=RAY)
    assert "going on with what was begun" in notes.said[0] and not list((tmp_path / "scratch").iterdir())

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(in_process, "read_into", no_room)
    with pytest.raises(UserError) as error:
        make_source("log", options).prepare(source, str(tmp_path / "other"))
    assert str(error.value).startswith(full.replace("out'", "other'")) and not (tmp_path / "other").exists()


def test_a_cluster_without_the_memory_is_refused(ray, tmp_path):
    write(tmp_path / "log", u=[1])
    with pytest.raises(
        UserError, match=r"a task takes about [\d,]+ MiB of memory, and no host of the cluster has"
    ):
        make_source("log", {"columns": COLUMNS, "chunk_rows": 10**10}).prepare(
            str(tmp_path / "log"), str(tmp_path / "out"), engine=RAY
        )


# -- Ray Data ----------------------------------------------------------------------------------------------------------


def test_whatever_ray_reads(ray, tmp_path):
    """The order of ties is the dataset's own, with both engines and however its blocks are made."""
    pq.write_table(pa.table(ray_logs.columns()), tmp_path / "log.parquet")
    expected = make_source("log", {"columns": COLUMNS}).prepare(
        str(tmp_path / "log.parquet"), str(tmp_path / "expected")
    )
    for function in ("tied", "mapped", "united"):
        for engine in (Engine(), RAY):
            found = made(
                f"tests.unit.ray_logs:{function}",
                tmp_path / "out",
                engine,
                "ray",
                columns=COLUMNS,
                partitions=4,
            )
            assert found["manifest"]["generation"] == expected.manifest.generation
            assert found["manifest"]["provenance"]["source"] == f"tests.unit.ray_logs:{function}"


def test_types_are_known_where_a_column_begins_late(ray, tmp_path):
    """What the first block has no value of is of the type that it is in a file."""
    columns = {**COLUMNS, "action_type": "a", "value": "v", "fields": {"f": "f"}}
    pq.write_table(pa.table(ray_logs.late_columns()), tmp_path / "log.parquet")
    expected = make_source("log", {"columns": columns}).prepare(
        str(tmp_path / "log.parquet"), str(tmp_path / "expected")
    )
    for engine in (Engine(), RAY):
        source = "tests.unit.ray_logs:from_items"
        found = made(source, tmp_path / "out", engine, "ray", columns=columns, partitions=4)
        assert found["manifest"]["generation"] == expected.manifest.generation and found["said"] == []


def test_bad_rows_of_blocks(ray, tmp_path):
    source, columns = "tests.unit.ray_logs:with_bad_rows", COLUMNS
    found = both(source, tmp_path, "ray", columns=columns, on_bad_rows="quarantine", partitions=2)
    assert [(b["file"], b["row_group"], b["row"]) for b in found["quarantine"]] == [(source, 1, 1)]
    refused = both(source, tmp_path, "ray", columns=columns, partitions=2)["error"]
    assert refused.startswith(f"'{source}', block 1, row 1, column 'u': the value is missing")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, "a Ray Data dataset is made by a function: give --dataset module:function"),
        ("tests.unit.ray_logs", "the dataset 'tests.unit.ray_logs' is not of the form module:function"),
        ("tests.unit.no_logs:tied", "there is no module 'tests.unit.no_logs' for the dataset"),
        (
            "tests.unit.ray_logs:tide",
            "module 'tests.unit.ray_logs' has no function 'tide': did you mean 'tied'?",
        ),
        (
            "tests.unit.ray_logs:no_dataset",
            "'tests.unit.ray_logs:no_dataset' gave int, not a ray.data.Dataset",
        ),
        (
            "tests.unit.ray_logs:NOT_A_FUNCTION",
            "'tests.unit.ray_logs:NOT_A_FUNCTION' is of type int, no function",
        ),
        (
            "tests.unit.ray_logs:failing",
            "'tests.unit.ray_logs:failing' failed (RuntimeError: no such day, line ",
        ),
        ("tests.unit.ray_logs:leaving", "'tests.unit.ray_logs:leaving' failed (SystemExit: 3, line "),
        (
            "tests.unit.ray_logs:failing_in_a_task",
            "'tests.unit.ray_logs:failing_in_a_task' failed (ValueError: no such column, line ",
        ),
        ("tests.unit.ray_logs:twice", "'tests.unit.ray_logs:twice' "),
        (
            "tests.unit.ray_logs:without_times",
            "'tests.unit.ray_logs:without_times' has no column 't': known: i, u",
        ),
        (
            "tests.unit.ray_logs:lists_later",
            "'block 1 of tests.unit.ray_logs:lists_later', column 'u': type list<item: int64> cannot be used as user; ",
        ),
        (
            "tests.unit.ray_logs:moments_later",
            "'block 1 of tests.unit.ray_logs:moments_later', column 't': type timestamp[s], where the first block has "
            "int64; cast it to one type in the dataset",
        ),
        ("tests.unit.ray_logs:without_rows", "the dataset of 'tests.unit.ray_logs:without_rows' has no rows"),
    ],
)
def test_datasets_that_cannot_be(ray, tmp_path, source, sentence):
    with pytest.raises(UserError) as error:
        make_source("ray", {"columns": COLUMNS}).prepare(source, str(tmp_path / "out"))
    assert str(error.value).startswith(sentence) and not list(tmp_path.iterdir())


# -- the seams, without a cluster --------------------------------------------------------------------------------------


def test_shares_of_files_with_more_users_than_32_bits_count(monkeypatch):
    r = np.random.default_rng(2)
    users_P = r.integers(0, 2**28, 40) * (r.random(40) < 0.7)
    sums_P1 = np.concatenate([[0], np.cumsum(users_P)])
    assert sums_P1[-1] > 2**31
    at = dict.fromkeys(range(40), 0)
    files = -(-int(sums_P1[-1]) // 2**18)
    partition = -1
    for number in range(files):
        found = list(shares(sums_P1, number))
        assert sum(stop - start for _, start, stop in found) == (
            2**18 if number < files - 1 else int(sums_P1[-1]) - number * 2**18
        )
        for p, start, stop in found:
            assert p >= partition and at[p] == start < stop <= users_P[p]
            partition, at[p] = p, stop
    assert [at[p] for p in range(40)] == users_P.tolist()


def test_more_than_32_bits_count_is_refused_not_wrapped(monkeypatch):
    rows = Sequences(
        np.array([0, 2**31]), np.array([0]), {"item": np.zeros(1, np.int32)}, {"user_id": np.array([7])}
    )
    with pytest.raises(UserError) as error:
        to_table(rows)
    assert str(error.value) == (
        "1 users from user 7 on have 2,147,483,648 actions, and a block of a dataset holds 2,147,483,647 at most: set "
        "max_user_actions to keep only the latest of each user"
    )
    table = pa.table({"user": pa.chunked_array([["aaaa"], ["bbbb"]]), "item": [1, 2]})
    assert whole(table)["user"].num_chunks == 1
    monkeypatch.setattr(partitions, "MOST_TEXT", 7)
    with pytest.raises(UserError, match="2 actions have more than 7 bytes of text in 'user'"):
        whole(table)
    monkeypatch.setattr(ids, "MOST_TEXT", 7)
    codes = IdCodes()
    codes.codes(pa.array(["aaaa"]))
    with pytest.raises(UserError, match="the distinct item ids have 8 bytes of text, and 7 is the most"):
        codes.codes(pa.array(["bbbb"]))
    with pytest.raises(UserError, match="the distinct item ids have 8 bytes of text"):
        union([pa.array(["aaaa"]), pa.array(["bbbb"])])


def test_a_union_is_what_one_after_the_other_finds():
    r = np.random.default_rng(5)
    parts = [pa.array(r.integers(0, 300, n)).unique() for n in (0, 1, 200, 3, 100, 5, 5, 900)]
    codes = IdCodes()
    for part in parts:
        codes.codes(part)
    assert union(parts).ids.equals(codes.ids)


def test_what_was_seen_of_a_files_times_adds_up():
    whole, parts = FileTimes(), [FileTimes(), FileTimes(), FileTimes()]
    for n, part in enumerate(parts[1:], 1):
        for one in (whole, part):
            one.rows, one.zoned, one.naive = one.rows + n, one.zoned + 1, one.naive + 2
            one.span(5 - n, 7 * n)
            one.early_span(n, -n, n)
            one.sentinels[n % 2] = one.sentinels.get(n % 2, 0) + n
    total = FileTimes()
    for part in parts:
        total.merge(part)
    assert total == whole


def test_a_module_that_is_called_as_ray_is_named(monkeypatch):
    other = ModuleType("ray")
    other.__file__ = "elsewhere/ray.py"
    monkeypatch.setitem(sys.modules, "ray", other)
    with pytest.raises(
        UserError, match=r"^'elsewhere/ray\.py' is called as Ray is and found in its place: give"
    ):
        import_ray()
