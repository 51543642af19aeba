"""A user with millions of actions: named, capped, and counted; the cap does not depend on how the log is cut."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.making.huge import Capped, latest
from tests.unit.logs_common import COLUMNS, make, write


def random_log(folder, rows=4000, files=3, **columns):
    r = np.random.default_rng(5)
    table = {
        "u": np.where(r.random(rows) < 0.5, 7, r.integers(0, 90, rows)),
        "i": r.integers(0, 60, rows),
        "t": r.integers(0, 300, rows),  # many ties
    }
    for n, at in enumerate(np.array_split(np.arange(rows), files)):
        write(folder, f"part-{n}.parquet", **{k: v[at] for k, v in table.items()}, **columns)
    return table


def by_hand(table, most, timed=True):
    """user -> [item] of the latest actions, by a stable sort in plain Python."""
    users: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in zip(table["u"].tolist(), table["i"].tolist(), table["t"].tolist()):
        users.setdefault(user, []).append((time, item))
    return {
        user: [item for _, item in (sorted(actions, key=lambda a: a[0]) if timed else actions)[-most:]]
        for user, actions in users.items()
    }


@pytest.mark.parametrize("most", [1, 17, 10_000])
@pytest.mark.parametrize(("chunk_rows", "partitions"), [(2**20, 1), (100, 1), (100, 8)])
@pytest.mark.parametrize("timed", [True, False])
def test_the_latest_of_each_user_stay(tmp_path, most, chunk_rows, partitions, timed):
    table = random_log(tmp_path / "log")
    columns = COLUMNS if timed else {"user": "u", "item": "i"}
    form = {"chunk_rows": chunk_rows, "partitions": partitions, "columns": columns, "max_user_actions": most}
    made = make(tmp_path / "log", tmp_path / "out", **form)
    expected = by_hand(table, most, timed)
    assert {u: [row[0] for row in rows] for u, rows in made.rows.items()} == expected
    lost = 4000 - sum(map(len, expected.values()))
    sizes = np.unique(table["u"], return_counts=True)[1]
    assert made.facts["capped"] == {"users": int((sizes > most).sum()), "actions": lost}
    stages = {s["stage"]: (s["actions"], s["users"], s["items"]) for s in made.facts["stages"]}
    assert stages["read"] == (4000, len(expected), 60)
    kept = {i for items in expected.values() for i in items}
    assert stages["latest of each user"] == stages["dataset"] == (4000 - lost, len(expected), len(kept))
    assert any("were left out" in s for s in made.said) == (lost > 0)


def test_the_cap_comes_before_what_counts(tmp_path):
    table = random_log(tmp_path / "log")
    form = {"max_user_actions": 20, "filter": {"min_item_count": 15}, "duplicates": "drop_exact"}
    made = make(tmp_path / "log", tmp_path / "out", partitions=4, chunk_rows=300, **form)
    seen: dict[int, list[tuple[int, int]]] = {}
    for user, item, time in zip(table["u"].tolist(), table["i"].tolist(), table["t"].tolist()):
        seen.setdefault(user, []).append((time, item))
    last = {u: sorted(a, key=lambda x: x[0])[-20:] for u, a in seen.items()}
    unique = {u: list(dict.fromkeys(a)) for u, a in last.items()}
    counts: dict[int, int] = {}
    for actions in unique.values():
        for _, item in actions:
            counts[item] = counts.get(item, 0) + 1
    expected = {u: [(i, t) for t, i in a if counts[i] >= 15] for u, a in unique.items()}
    assert made.rows == {u: a for u, a in expected.items() if a}
    assert [s["stage"] for s in made.facts["stages"]] == [
        "rows of the log", "read", "latest of each user", "duplicates dropped", "minimum counts", "minimum length",
        "dataset",
    ]  # fmt: skip


def test_pieces_are_capped_as_the_whole_is():
    r = np.random.default_rng(1)
    table = pa.table(
        {"user": r.integers(0, 5, 5000), "item": np.arange(5000), "time": r.integers(0, 50, 5000)}
    )
    whole, many = latest(table, 30)
    assert sorted(many.to_pylist()) == [0, 1, 2, 3, 4] and whole.num_rows == 150
    capped = Capped(30)
    capped._limit = -(2**16)  # so that every piece is worked in at once
    for start in range(0, 5000, 7):
        capped.add(table.slice(start, 7))
        capped._limit = -(2**16)
    assert capped.table() == whole and capped.users == {0, 1, 2, 3, 4}
    assert latest(table, 5000)[0] is table and Capped(3).table() is None


def test_who_is_huge_is_said_before_the_work(tmp_path):
    rows = 60_000
    users = np.where(np.arange(rows) % 2, "robot", np.arange(rows).astype(str))
    log = write(tmp_path, u=users)
    made = make(log, tmp_path / "out", memory_mb=1, chunk_rows=5000)
    [said] = made.said
    assert said.startswith(
        "user 'robot' has 30,000 of the 60,000 actions, which take about 11 MiB of memory where"
    )
    assert "memory_mb is 1: set max_user_actions to keep only the latest of each user" in said
    assert make(log, tmp_path / "out", memory_mb=1, chunk_rows=5000, max_user_actions=10).said == [
        "max_user_actions 10: 1 users had more, of whom 29,990 earlier actions were left out"
    ]
    assert make(log, tmp_path / "out").said == []  # the memory is there


LIMITED = """
import resource, sys
from gr.data.making.sources.base import make_source
from gr.errors import UserError
log, out, megabytes, most = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
options = {"columns": {"user": "u", "item": "i", "time": "t"}, "memory_mb": 8, "chunk_rows": 50_000}
options["max_user_actions"] = most or None
try:
    print(make_source("log", options).prepare(log, out).actions)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_sentence_when_memory_runs_out_names_the_user(tmp_path):
    rows = 2_000_000
    r = np.random.default_rng(0)
    users = np.where(r.random(rows) < 0.75, 7, r.integers(0, 10**5, rows))
    table = pa.table({"u": users, "i": r.integers(0, 1000, rows), "t": r.integers(0, 10**9, rows)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=100_000)
    huge = int((users == 7).sum())

    def run(megabytes: int, most: int) -> str:
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "log.parquet"), str(tmp_path / "out")]
        done = subprocess.run(
            [*command, str(megabytes), str(most)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(200, 0) == (
        f"out of memory for '{tmp_path / 'out'}': user 7 has {huge:,} of the 2,000,000 actions, and a user's actions "
        "are not cut; set max_user_actions to keep only the latest of each user, or give it more memory"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["log.parquet"]  # nothing is left behind
    assert int(run(200, 1000)) == rows - huge + 1000
