"""Which files a log has: each once, whatever leads to it, and none of what is made of it."""

from __future__ import annotations

import os

import pytest

from gr.data.making.sources.base import make_source
from gr.data.making.sources.log import ActionLog
from gr.errors import UserError
from tests.unit.logs_common import COLUMNS, NOW, make, refusal, write


@pytest.mark.parametrize("glob", ["", "/*", "/**", "/**/*.parquet", "/*/*.parquet"])
def test_a_file_that_a_glob_names_twice_is_read_once(tmp_path, glob):
    for day in (1, 2):
        write(tmp_path / "log", f"dt={day}/part-0.parquet", u=[day])
    assert make(f"{tmp_path}/log{glob}", tmp_path / "out").rows == {1: [(1, NOW)], 2: [(1, NOW)]}


@pytest.mark.parametrize("glob", ["", "/*", "/**/*.parquet", "/*/*.parquet"])
def test_links_are_what_they_lead_to_once(tmp_path, glob):
    """A folder on another disk, the latest day under a name of its own."""
    write(tmp_path / "log", "dt=1/part-0.parquet", u=[1])
    write(tmp_path / "disk", "two/part-0.parquet", u=[2])
    os.symlink(tmp_path / "disk" / "two", tmp_path / "log" / "dt=2")
    os.symlink(tmp_path / "log" / "dt=1", tmp_path / "log" / "latest")
    for form in ({}, {"format": "parquet"}):
        made = make(f"{tmp_path}/log{glob}", tmp_path / "out", **form)
        assert made.rows == {1: [(1, NOW)], 2: [(1, NOW)]}
        link = f"{tmp_path}/log/latest/part-0.parquet"
        assert made.said == [
            f"left out of '{tmp_path}/log{glob}', links to files that it has already: '{link}'"
        ]


def test_a_link_back_to_its_folder_is_refused(tmp_path):
    write(tmp_path / "log", "dt=1/part-0.parquet", u=[1])
    os.symlink(tmp_path / "log", tmp_path / "log" / "dt=1" / "all")
    assert refusal(tmp_path / "log", tmp_path / "out") == (
        f"'{tmp_path}/log/dt=1/all' is a link to a folder that it lies in: remove it, or name the files by a glob"
    )


@pytest.mark.parametrize(
    ("source", "out", "apart"),
    [
        ("log", "log", False),
        ("log", "log/out", False),
        ("log", "log/dt=2/out", False),
        ("log", "log-prepared", True),
        ("log", "log/_out", True),  # such names are left out
        ("log/*.parquet", "log/out", True),
        ("log/*.parquet", "log/out.parquet", False),
        ("log/*", "log/out", False),
        ("log/*", "log/_out", True),
        ("log/**/*.parquet", "log/out", False),
        ("log/dt=*", "log/dt=1/out", False),
        ("log/dt=*", "log/out", True),
        ("log/dt=*/*.parquet", "log/dt=1/out", True),
        ("log/a.parquet", "log/out", True),
        ("link", "log/out", False),
        ("log", "link/out", False),
        ("link/*", "log/out", False),
        ("linked", "log/dt=1/out", False),
        ("linked/dt=*", "log/dt=1/out", False),
        ("file://{}/log", "log/out", False),
    ],
)
def test_a_dataset_is_no_part_of_its_log(tmp_path, source, out, apart):
    for name in ("a.parquet", "dt=1/b.parquet"):
        write(tmp_path / "log", name, u=[1])
    os.symlink(tmp_path / "log", tmp_path / "link")
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path / "log" / "dt=1", tmp_path / "linked" / "dt=1")
    source = source.format(tmp_path) if "{}" in source else f"{tmp_path}/{source}"
    out = tmp_path / out
    if apart:
        assert make(source, out).rows == make(source, out).rows  # and again, with the dataset there
        return
    with pytest.raises(UserError) as error:
        make(source, out)
    assert str(error.value) == (
        f"--out '{out}' is in --source '{source}', and would be part of that log the next time: keep them apart, or "
        "name the log's files by a glob"
    )
    assert sorted(os.listdir(tmp_path / "log")) == ["a.parquet", "dt=1"]


def test_a_log_is_no_part_of_what_is_written(tmp_path):
    made = make(write(tmp_path / "log", u=[1]), tmp_path / "set").dataset
    before = made.manifest.digest
    for source in ("sequences", "sequences/*.parquet"):
        with pytest.raises(UserError, match=r"is in --out '.*/set', which is written to: keep them apart"):
            lists = {"columns": {"user": "user_id", "item": "items", "time": "timestamps"}}
            made_of = make_source("lists", lists)
            made_of.prepare(f"{tmp_path}/set/{source}", str(tmp_path / "set"), overwrite=True)
    with pytest.raises(UserError, match=r"^--to '.*/set' is in --source '.*', and would be part of that log"):
        ActionLog.append(str(tmp_path), str(tmp_path / "set"))
    assert made.manifest.digest == before


@pytest.mark.parametrize(("one", "other"), [("user", "item"), ("item", "time"), ("user", "value")])
def test_two_roles_of_one_column_are_refused(tmp_path, one, other):
    columns = {**COLUMNS, other: "x", one: "x"}
    with pytest.raises(UserError, match=f"'x' is both {one} and {other}: name a column of its own for each"):
        make_source("log", {"columns": columns})


def test_a_rating_may_be_type_and_value_and_fields_may_be_anything(tmp_path):
    columns = {
        **COLUMNS,
        "action_type": "r",
        "value": "r",
        "fields": {"exact": "t", "stars": "r", "sku": "i"},
    }
    made = make(write(tmp_path, r=[5, 4]), tmp_path / "out", columns=columns)
    assert made.column("value") == {1: [5.0, 4.0]} and made.column("exact") == {1: [NOW, NOW + 1]}
    assert made.column("type") == {1: [1, 0]} and made.column("stars") == {1: [5, 4]}
