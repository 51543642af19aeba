"""A log or a disk that fails on the way: one sentence, nothing left behind, nothing read that isn't there."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data import blocks, dataset as datasets
from gr.data.making.files import DataFile
from gr.data.making.partitions import PartitionStore
from tests.unit.logs_common import ASIDE, NOW, make, refusal, write, write_text


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_truncated_file_is_named(tmp_path):
    for n in range(2):
        write(tmp_path / "log", f"part-{n}.parquet", u=list(range(500)))
    file = tmp_path / "log" / "part-1.parquet"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:3], b""):
        file.write_bytes(content)
        said = refusal(tmp_path / "log", tmp_path / "out")
        assert said.startswith(f"cannot read '{file}' as Parquet (") and said.endswith("): check the file")
    assert left(tmp_path) == ["log"]


def test_files_without_rows_say_nothing(tmp_path):
    source = tmp_path / "log"
    write(source, "part-0.parquet", u=pa.array([], pa.int64()))
    write(source, "part-1.parquet", u=[1, 2])
    write(
        source,
        "part-2.parquet",
        u=pa.array([], pa.null()),
        i=pa.array([], pa.null()),
        t=pa.array([], pa.null()),
    )
    assert make(source, tmp_path / "out").rows == {1: [(1, NOW)], 2: [(2, NOW + 1)]}
    for n in (1, 2):
        (source / f"part-{n}.parquet").unlink()
    assert "has no valid action (it is empty)" in refusal(source, tmp_path / "none")


def test_a_schema_that_changes_between_files_is_named(tmp_path):
    source = tmp_path / "log"
    write(source, "part-0.parquet", u=[1, 2])
    later = source / "part-1.parquet"
    write(source, "part-1.parquet", u=[1, 2], i=None)
    assert refusal(source, tmp_path / "out").startswith(f"'{later}' has no column 'i': known: t, u")
    write(source, "part-1.parquet", u=[1, 2], i=[{"id": 1}, {"id": 2}])
    assert refusal(source, tmp_path / "out").startswith(
        f"'{later}', column 'i': type struct<id: int64> cannot be used"
    )
    write(source, "part-1.parquet", u=[1, 2], i=["a", "b"])
    assert refusal(source, tmp_path / "out").startswith(
        f"'{later}', row group 0, row 0, column 'i': 'a' is not an int"
    )
    write(
        source, "part-1.parquet", u=[1, 2], i=pa.array([5, 6], pa.int8()), more=[1, 1]
    )  # narrower, and one more
    assert make(source, tmp_path / "out").dataset.actions == 4


def test_ids_out_of_range_are_bad_rows(tmp_path):
    largest = 2**63 - 1
    assert list(make(write(tmp_path, u=[largest, -(2**63)]), tmp_path / "out").rows) in (
        [largest, -(2**63)],
        [-(2**63), largest],
    )
    file = write(tmp_path, i=pa.array([1, 2**63], pa.uint64()))
    said = refusal(file, tmp_path / "no")
    assert said.startswith(f"'{file}', row group 0, row 1, column 'i': {2**63} ") and said.endswith(ASIDE)
    file = write_text(tmp_path, f"u,i,t\n1,2,{NOW}\n1,{2**63},{NOW}\n")
    said = refusal(file, tmp_path / "no", item_ids="integer")
    assert said.startswith(f"'{file}', line 3, column 'i': '{2**63}' ") and said.endswith(ASIDE)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_goes_away_while_the_log_is_read_is_named(tmp_path, monkeypatch, when):
    source = tmp_path / "log"
    for n in range(2):
        write(source, f"part-{n}.parquet", u=[1, 2])
    later = source / "part-1.parquet"
    real = DataFile.row_groups

    def vanishing(file, parquet, columns, groups):
        if when == "before" or file.path == str(later):
            later.unlink(missing_ok=True)
        return real(file, parquet, columns, groups)

    monkeypatch.setattr(DataFile, "row_groups", vanishing)
    if when == "before":
        assert refusal(source, tmp_path / "out").startswith(f"cannot read '{later}' as Parquet (")
    else:  # it is open: the system keeps its content until it is closed
        assert make(source, tmp_path / "out").dataset.actions == 4


@pytest.mark.parametrize("what", ["partitions", "sequences"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, what):
    """/dev/full takes nothing: the system's own answer."""
    file = write(tmp_path, u=list(range(20_000)))
    if what == "partitions":
        monkeypatch.setattr(PartitionStore, "_path", lambda self, partition: Path("/dev/full"))
    else:
        monkeypatch.setattr(blocks, "place", lambda block, earlier: ("/dev/full", block))
    said = refusal(file, tmp_path / "out", partitions=2)
    assert said.startswith(f"no space is left on the disk for '{tmp_path / 'out'}'")
    assert said.endswith("make room, or set scratch to a folder on another disk")
    assert left(tmp_path) == ["log.parquet"]


def test_a_full_disk_leaves_the_dataset_that_was_there(tmp_path, monkeypatch):
    file = write(tmp_path, u=[1, 2])
    before = make(file, tmp_path / "out").dataset.manifest
    monkeypatch.setattr(blocks, "place", lambda block, earlier: ("/dev/full", block))
    with pytest.raises(Exception, match="no space is left"):
        make(file, tmp_path / "out")
    monkeypatch.undo()
    assert datasets.SequenceDataset(tmp_path / "out").manifest == before
    assert pq.read_metadata(tmp_path / "out" / "catalogue.parquet").num_rows == 2


@pytest.mark.parametrize("ending", ["csv.xz", "zip", "tar"])
def test_what_has_to_be_unpacked_first_is_said(tmp_path, ending):
    file = write_text(tmp_path / "log", "u,i,t\n1,2,3\n", f"a.{ending}")
    for source, name, schema in ((file.parent, file.name, {}), (file, file, {"format": "csv"})):
        assert refusal(source, tmp_path / "out", **schema) == (
            f"'{name}' is packed in a way that isn't read: unpack it, or pack each file by itself as .gz, .bz2, .zst"
        )
    write(tmp_path / "log", "b.parquet", u=[1])
    assert make(tmp_path / "log", tmp_path / "out").said  # beside data it is left out, which is said


def test_text_in_another_encoding_is_said_at_its_header(tmp_path):
    file = tmp_path / "log.csv"
    file.write_bytes(f"u,i,t\n1,2,{NOW}\n".encode("utf-16"))
    assert refusal(file, tmp_path / "out") == (
        f"'{file}' has zeros among the bytes of its first line, so it is no text in utf-8: set csv.encoding (utf-16, "
        "for example), or write the file again"
    )
    assert make(file, tmp_path / "out", csv={"encoding": "utf-16"}).rows == {1: [(2, NOW)]}


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_a_header_that_was_not_cut_names_its_delimiter(tmp_path, delimiter):
    header = delimiter.join("uit")
    file = write_text(tmp_path, f"{header}\n{delimiter.join(['1', '2', str(NOW)])}\n", "log.tsv")
    assert refusal(file, tmp_path / "out") == (
        f"'{file}' has no column 'u': it has one column, {header!r}; set csv.delimiter to {delimiter!r} if these are "
        "several"
    )
    assert make(file, tmp_path / "out", csv={"delimiter": delimiter}).rows == {1: [(2, NOW)]}
