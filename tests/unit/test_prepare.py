"""Preparing against a plain Python reference, and its independence of chunks, partitions and files."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import SequenceDataset
from gr.data.hashing import hash_ids
from gr.data.making import ids
from gr.data.making.ids import IdCodes
from gr.data.making.partitions import choose_bits, group, time_order
from gr.data.making.sources.base import make_source
from gr.errors import UserError
from gr.progress import Progress

COLUMNS = {"user": "u", "item": "i", "time": "t", "value": "v", "action_type": "a", "fields": {"device": "d"}}


@dataclass(frozen=True)
class Action:
    user: int | str
    item: int | str
    time: int
    value: float
    kind: str
    device: str


def random_log(seed: int, text: bool, actions: int = 600, users: int = 40, items: int = 25) -> list[Action]:
    """Many ties in time, ids with gaps and signs, exact repeats."""
    r = random.Random(seed)
    log = []
    for _ in range(actions):
        user, item = r.randrange(users) * 7 - 50, int(r.random() ** 2 * items) * 13 - 20
        log.append(
            Action(
                f"usér{user}" if text else user,
                f"i{item}" if text else item,
                r.randrange(12),
                r.choice([0.5, 1.0, 4.5]),
                r.choice(["view", "buy", "like"]),
                r.choice(["phone", "tv", ""]),
            )
        )
        if r.random() < 0.1:
            log.append(log[-1])
    return log


def table(log: list[Action]) -> pa.Table:
    return pa.table(
        {
            "u": [a.user for a in log],
            "i": [a.item for a in log],
            "t": [a.time for a in log],
            "v": pa.array([a.value for a in log], pa.float32()),
            "a": [a.kind for a in log],
            "d": [a.device for a in log],
        }
    )


def write_parquet(folder: Path, log: list[Action], files: int = 1, row_group: int = 100) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    whole = table(log)
    cuts = np.linspace(0, len(log), files + 1).astype(int)
    for n, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        pq.write_table(
            whole.slice(start, stop - start), folder / f"part-{n:03d}.parquet", row_group_size=row_group
        )
    return str(folder)


def prepare(source: str, out: Path, **options) -> SequenceDataset:
    return make_source("log", {"columns": COLUMNS, **options}).prepare(source, str(out), overwrite=True)


def reference(log, *, drop=False, mode="once", min_item=0, min_user=0, min_length=1):
    """(sequences by user in order, kept item ids in order), by dictionaries and sorts of tuples."""
    rows = list(log)
    if drop:
        seen, kept = set(), []
        for a in rows:
            if (a.user, a.item, a.time) not in seen:
                seen.add((a.user, a.item, a.time))
                kept.append(a)
        rows = kept
    while True:
        item_counts, user_counts = Counter(a.item for a in rows), Counter(a.user for a in rows)
        left = [a for a in rows if item_counts[a.item] >= min_item and user_counts[a.user] >= min_user]
        done = mode == "once" or len(left) == len(rows)
        rows = left
        if done:
            break
    items = sorted({a.item for a in rows}, key=lambda i: i if isinstance(i, int) else i.encode())
    by_user: dict = {}
    for a in rows:
        by_user.setdefault(a.user, []).append(a)
    users = [u for u in by_user if len(by_user[u]) >= min_length]
    order = dict(zip(users, hash_ids(np.array(users)).tolist(), strict=True)) if users else {}
    users.sort(key=lambda u: (order[u], u))
    return [(u, sorted(by_user[u], key=lambda a: a.time)) for u in users], items


def check(dataset: SequenceDataset, expected) -> None:
    sequences, items = expected
    rows = dataset.read_rows(0, dataset.users)
    kinds = sorted({"view", "buy", "like"})
    assert rows.users_R.tolist() == [u for u, _ in sequences]
    actions = [a for _, sequence in sequences for a in sequence]
    assert np.diff(rows.offsets_R1).tolist() == [len(s) for _, s in sequences]
    assert rows.items_A.tolist() == [items.index(a.item) for a in actions]
    assert rows.timestamps_A.tolist() == [a.time for a in actions]
    assert rows.columns["value"].tolist() == [a.value for a in actions]
    assert [dataset.manifest.action_type_names[c] for c in rows.columns["type"]] == [a.kind for a in actions]
    assert rows.columns["device"].tolist() == [a.device for a in actions]
    assert dataset.manifest.action_type_names == kinds
    assert dataset.catalogue["item_id"].to_pylist() == items
    counts = Counter(a.item for a in actions)
    assert dataset.catalogue["count"].to_pylist() == [counts[i] for i in items]
    assert (rows.items_A.dtype, rows.timestamps_A.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_as_reference_with_tied_times(tmp_path, seed, text):
    log = random_log(seed, text)
    source = write_parquet(tmp_path / "log", log, files=3)
    check(prepare(source, tmp_path / "out", chunk_rows=64, partitions=4), reference(log))
    dropped = prepare(source, tmp_path / "out", duplicates="drop_exact", partitions=4)
    check(dropped, reference(log, drop=True))
    assert dropped.actions < len(log)


@pytest.mark.parametrize("mode", ["once", "core"])
@pytest.mark.parametrize("partitions", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_minimum_counts_against_brute_force(tmp_path, seed, partitions, mode):
    log = random_log(seed, text=seed % 2 == 1, actions=400, users=60, items=60)
    source = write_parquet(tmp_path / "log", log)
    for low_item, low_user, length in ((5, 5, 5), (8, 9, 1), (3, 0, 4), (0, 11, 1)):
        limits = {"min_item_count": low_item, "min_user_count": low_user, "min_length": length, "mode": mode}
        expected = reference(log, mode=mode, min_item=low_item, min_user=low_user, min_length=length)
        if not expected[0]:
            with pytest.raises(UserError, match="no sequence is left"):
                prepare(source, tmp_path / "out", filter=limits, partitions=partitions)
            continue
        check(prepare(source, tmp_path / "out", filter=limits, partitions=partitions), expected)


@pytest.mark.parametrize("text", [False, True])
def test_content_does_not_depend_on_chunks_partitions_files(tmp_path, text):
    log = random_log(7, text)
    policies = {
        "duplicates": "drop_exact",
        "filter": {"mode": "core", "min_item_count": 4, "min_user_count": 4},
    }
    prints = set()
    for n, (files, chunk, partitions) in enumerate(
        [(1, 2**20, 1), (5, 7, 1), (2, 50, 2), (13, 1000, 64), (1, 1, 16)]
    ):
        source = write_parquet(tmp_path / f"log{n}", log, files=files)
        dataset = prepare(source, tmp_path / f"out{n}", chunk_rows=chunk, partitions=partitions, **policies)
        prints.add((dataset.manifest.fingerprint, str(dataset.catalogue.to_pydict()), dataset.actions))
    assert len(prints) == 1


def test_partitions_are_chosen_by_memory_and_rows_stay_whole(tmp_path):
    rng = np.random.default_rng(0)
    n = 60_000
    log = pa.table(
        {"u": rng.integers(0, 900, n), "i": rng.integers(0, 300, n), "t": rng.integers(0, 10**6, n)}
    )
    pq.write_table(log, tmp_path / "log.parquet")
    columns = {"user": "u", "item": "i", "time": "t"}
    one = prepare(str(tmp_path / "log.parquet"), tmp_path / "one", columns=columns)
    many = prepare(
        str(tmp_path / "log.parquet"), tmp_path / "many", columns=columns, memory_mb=1, chunk_rows=5000
    )
    assert one.manifest.fingerprint == many.manifest.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.parquet",
        "many",
        "one",
    ]  # nothing is left behind


def test_csv_and_parquet_give_the_same(tmp_path):
    log = random_log(11, text=False)
    parquet = prepare(write_parquet(tmp_path / "log", log), tmp_path / "a")
    (tmp_path / "csv").mkdir()
    arrow_csv.write_csv(table(log), tmp_path / "csv" / "log.csv")
    csv = prepare(str(tmp_path / "csv"), tmp_path / "b", chunk_rows=100)
    check(csv, reference(log))
    assert csv.manifest.fingerprint == parquet.manifest.fingerprint


def test_sub_second_order_is_kept_though_seconds_are_written(tmp_path):
    # item 2 came first within the same second, though later in the file
    stamps = [1_700_000_000_900, 1_700_000_000_100, 1_699_999_999_999]
    raw = {"u": [1, 1, 1], "i": [1, 2, 3]}
    tables = {
        "ms": pa.table({**raw, "t": stamps}),
        "us": pa.table({**raw, "t": [s * 1000 for s in stamps]}),
        "s": pa.table({**raw, "t": pa.array(stamps, pa.timestamp("ms"))}),
        "ns": pa.table({**raw, "t": pa.array(stamps, pa.timestamp("ms", "Europe/Berlin"))}),
    }
    texts = ["2023-11-14T22:13:20.900Z", "2023-11-14 23:13:20.1+01:00", "2023-11-14 22:13:19.999"]
    tables["iso"] = pa.table({**raw, "t": texts})
    for unit, log in tables.items():
        pq.write_table(log, tmp_path / "log.parquet")
        columns = {"user": "u", "item": "i", "time": "t"}
        zone = "UTC" if unit == "iso" else None  # the texts mix
        rows = prepare(
            str(tmp_path / "log.parquet"), tmp_path / "out", columns=columns, time_unit=unit, time_zone=zone
        ).read_rows(0, 1)
        assert rows.items_A.tolist() == [2, 1, 0], unit
        assert rows.timestamps_A.tolist() == [1_699_999_999, 1_700_000_000, 1_700_000_000], unit


def test_times_too_wide_for_one_sort_key_sort_the_same():
    rng = np.random.default_rng(3)
    users, times = rng.integers(0, 50, 5000), rng.choice([-(2**62), -5, 0, 7, 2**62], 5000)
    wide = group(pa.table({"user": users, "item": np.arange(5000, dtype=np.int32), "time": times}))
    squeezed = np.searchsorted(np.unique(times), times)
    narrow = group(pa.table({"user": users, "item": np.arange(5000, dtype=np.int32), "time": squeezed}))
    assert wide.items_A.tolist() == narrow.items_A.tolist() and wide.users_R.equals(narrow.users_R)
    for n, user in enumerate(wide.users_R.to_pylist()):
        rows = np.flatnonzero(users == user)
        expected = rows[np.argsort(times[rows], kind="stable")]
        assert wide.items_A[wide.offsets_R1[n] : wide.offsets_R1[n + 1]].tolist() == expected.tolist()


@pytest.mark.parametrize("users", [1, 50, 70_000])
@pytest.mark.parametrize("last", [0, 1000, 2**45, 2**50, 2**62, None])
def test_actions_of_any_times_and_users_are_sorted_stably(users, last):
    r = np.random.default_rng(users)
    rank_A = r.integers(0, users, 5000)
    time_A = None if last is None else np.sort(r.integers(-last, last + 1, 9))[r.integers(0, 9, 5000)]
    expected = np.lexsort((rank_A,) if time_A is None else (time_A, rank_A))
    assert time_order(rank_A, time_A, users).tolist() == expected.tolist()


@pytest.mark.parametrize("apart", [1, 10**6, 2**40])
def test_codes_are_those_of_first_appearance_however_far_apart_ids_are(monkeypatch, apart):
    """Known ones at first, more on both sides, some added beside, gaps that are too wide and are filled later."""
    monkeypatch.setattr(ids, "FEW", 40)
    r = np.random.default_rng(apart % 7)
    codes, known = IdCodes(), {}

    def code(value: int) -> int:
        return known.setdefault(value, len(known))

    for n, spread in enumerate((3, 10, 0, 200, 30, 200, 5, 150)):
        chunk = r.integers(-spread, spread + 1, 2 * spread) * apart
        if n == 6:
            beside = [chunk[0], *(v * apart for v in range(-99, 99) if v * apart not in known)][:9]
            codes.add([pa.array(beside)])
            beside = [code(value) for value in beside]
        assert codes.codes(pa.array(chunk, pa.int64())).tolist() == [code(value) for value in chunk.tolist()]
        assert codes.codes(pa.array(chunk, pa.int64())).dtype == np.int32
    assert codes.ids.to_pylist() == list(known)


def test_memory_that_cannot_do_is_refused():
    assert choose_bits(10**8, 120, 512, None) == 5 and choose_bits(1000, 120, 512, None) == 0
    with pytest.raises(UserError) as error:
        choose_bits(10**9, 120, 64, None)
    assert (
        str(error.value)
        == "memory_mb 64 is too little for about 1,000,000,000 actions: set it to 224 or more"
    )
    assert choose_bits(10**9, 120, 224, None) == 9


def test_without_times_the_order_is_the_files(tmp_path):
    for n, items in enumerate(([5, 3], [9], [3, 1])):
        pq.write_table(pa.table({"u": [1] * len(items), "i": items}), tmp_path / f"part-{n}.parquet")
    dataset = prepare(str(tmp_path / "part-*.parquet"), tmp_path / "out", columns={"user": "u", "item": "i"})
    assert dataset.read_rows(0, 1).items_A.tolist() == [2, 1, 3, 1, 0]
    assert not dataset.has_timestamps
    with pytest.raises(UserError, match="duplicates=drop_exact compares times, and this log has none"):
        prepare(
            str(tmp_path / "part-*.parquet"),
            tmp_path / "out2",
            columns={"user": "u", "item": "i"},
            duplicates="drop_exact",
        )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_catalogue_is_joined(tmp_path, kind):
    pq.write_table(pa.table({"u": [1, 1, 2], "i": [30, 4, 30], "t": [1, 2, 3]}), tmp_path / "log.parquet")
    described = pa.table(
        {"id": [30, 2, 100], "title": ["Thirty", "Zwei, drei", 'a "b"'], "price": ["1", "2", "3"]}
    )
    if kind == "csv":
        arrow_csv.write_csv(described, tmp_path / "items.csv")
    else:
        pq.write_table(described, tmp_path / "items.parquet")
    options = {
        "columns": {"user": "u", "item": "i", "time": "t"},
        "catalogue": {"path": str(tmp_path / f"items.{kind}"), "item": "id", "columns": ["title"]},
    }
    seen = prepare(str(tmp_path / "log.parquet"), tmp_path / "seen", **options)
    assert seen.catalogue.to_pydict() == {"item_id": [4, 30], "count": [1, 2], "title": [None, "Thirty"]}
    assert seen.manifest.provenance["items_not_described"] == 1
    listed = prepare(str(tmp_path / "log.parquet"), tmp_path / "listed", items="listed", **options)
    assert listed.catalogue.to_pydict() == {
        "item_id": [2, 4, 30, 100],
        "count": [0, 1, 2, 0],
        "title": ["Zwei, drei", None, "Thirty", 'a "b"'],
    }
    assert listed.read_rows(0, 2).items_A.tolist().count(2) == 2


def test_catalogue_errors(tmp_path):
    pq.write_table(pa.table({"u": [1], "i": [30], "t": [1]}), tmp_path / "log.parquet")
    options = {"columns": {"user": "u", "item": "i", "time": "t"}}
    items = tmp_path / "items.parquet"
    for content, message in (
        ({"id": [1, 2, 1]}, f"'{items}' lists item 1 more than once: leave one row of it"),
        ({"id": [1, None]}, f"'{items}', row 1, column 'id': the value is missing; correct the catalogue"),
        (
            {"id": ["1", "x"]},
            f"'{items}', row 1, column 'id': 'x' is not an integer id, where the log has integers; "
            "correct the catalogue",
        ),
        ({"ids": [1]}, f"'{items}' has no column 'id': did you mean 'ids'?"),
        (
            {"id": [1], "count": [1]},
            f"'{items}' has a column 'count', a name that gr gives: rename it or leave it out of columns",
        ),
        (
            pa.table([[1], ["a"], ["b"]], names=["id", "title", "title"]),
            f"'{items}' has more than one column 'title': give each a name of its own",
        ),
    ):
        pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), items)
        with pytest.raises(UserError) as error:
            prepare(
                str(tmp_path / "log.parquet"),
                tmp_path / "out",
                catalogue={"path": str(items), "item": "id"},
                **options,
            )
        assert str(error.value) == message
    assert not (tmp_path / "out").exists()


def test_stage_counts_add_up(tmp_path):
    log = random_log(3, text=False)
    limits = {"mode": "once", "min_item_count": 20, "min_user_count": 10, "min_length": 8}
    dataset = prepare(
        write_parquet(tmp_path / "log", log), tmp_path / "out", duplicates="drop_exact", filter=limits
    )
    stages = {s["stage"]: s for s in dataset.manifest.provenance["stages"]}
    unique = list({(a.user, a.item, a.time): a for a in log}.values())
    items, users = Counter(a.item for a in unique), Counter(a.user for a in unique)
    counted = [a for a in unique if items[a.item] >= 20 and users[a.user] >= 10]
    filters = ["duplicates dropped", "minimum counts", "minimum length"]
    assert list(stages) == ["rows of the log", "read", *filters, "dataset"]
    assert stages["rows of the log"]["actions"] == stages["read"]["actions"] == len(log)
    assert stages["read"]["users"] == len({a.user for a in log})
    assert stages["duplicates dropped"]["actions"] == len(unique)
    assert stages["minimum counts"] == {
        "stage": "minimum counts",
        "actions": len(counted),
        "users": len({a.user for a in counted}),
        "items": len({a.item for a in counted}),
    }
    assert stages["dataset"]["actions"] == dataset.actions == stages["minimum length"]["actions"]
    assert stages["dataset"]["users"] == dataset.users


def test_a_dataset_without_its_catalogue_is_named(tmp_path):
    source = write_parquet(tmp_path / "log", random_log(1, text=False))
    prepare(source, tmp_path / "out")
    (tmp_path / "out/catalogue.parquet").unlink()
    with pytest.raises(
        UserError, match=r"cannot read '.*catalogue\.parquet' \(.*: prepare the dataset again"
    ):
        _ = SequenceDataset(tmp_path / "out").catalogue


def test_existing_out_and_bad_partitions_are_refused(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "log", random_log(1, text=False))
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError) as error:
        make_source("log", {"columns": COLUMNS}).prepare(source, str(tmp_path / "out"))
    assert str(error.value) == f"'{tmp_path / 'out'}' exists: choose another --out, or say --overwrite"
    home = tmp_path / "home"
    home.mkdir()
    (home / "manifest.json").write_text("{}")
    (home / "letter.txt").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for kept in (home, home / "letter.txt", tmp_path / "link"):
        with pytest.raises(
            UserError, match=r"is not a dataset that could be overwritten: choose another --out"
        ):
            make_source("log", {"columns": COLUMNS}).prepare(source, str(kept), overwrite=True)
    assert (home / "letter.txt").read_text() == "dear"
    monkeypatch.chdir(tmp_path / "out" / "sequences")
    with pytest.raises(UserError, match=r"'\.\.' is the folder that you are in"):
        make_source("log", {"columns": COLUMNS}).prepare(source, "..", overwrite=True)
    assert SequenceDataset("..").users
    monkeypatch.chdir(tmp_path)
    make_source("log", {"columns": COLUMNS}).prepare(source, str(tmp_path / "out"), overwrite=True)
    with pytest.raises(UserError, match="partitions is 3: give a power of two up to 512"):
        prepare(source, tmp_path / "out2", partitions=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "link", "log", "out"]


def test_what_was_made_at_out_meanwhile_is_kept(tmp_path):
    source, out = write_parquet(tmp_path / "log", random_log(1, text=False)), tmp_path / "out"
    first = []

    class Meanwhile(Progress):
        def stage(self, name, *rest):
            if name == "writing" and not first:
                first.append(prepare(source, out).manifest)
            return super().stage(name, *rest)

    with pytest.raises(UserError, match="exists: choose another --out, or say --overwrite"):
        make_source("log", {"columns": COLUMNS}).prepare(source, str(out), progress=Meanwhile())
    assert first == [SequenceDataset(out).manifest]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]
