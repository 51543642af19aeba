"""Published data sets: their facts on the real files where these are, their protocols on small files of the form."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from gr.data.making.sources.base import make_source
from gr.errors import UserError
from tests.unit.logs_common import ASIDE


@pytest.mark.data
def test_ml_1m_facts(test_data, tmp_path):
    folder = test_data("ml-1m")
    dataset = make_source("ml-1m").prepare(str(folder), str(tmp_path / "ml-1m"))
    assert (dataset.users, dataset.items, dataset.actions) == (6040, 3883, 1_000_209)
    counts = dataset.catalogue["count"].to_numpy()
    assert (counts > 0).sum() == 3706 and counts.sum() == 1_000_209
    assert dataset.catalogue["title"][0].as_py() == "Toy Story (1995)"
    assert "Misérables, Les (1995)" in dataset.catalogue["title"].to_pylist()
    rows = dataset.read_rows(0, 200)
    # ties keep the order of the file: check whole users against the file itself
    raw: dict[int, list[tuple[int, int]]] = {}
    with (folder / "ratings.dat").open() as lines:
        for line in lines:
            user, item, _, time = map(int, line.split("::"))
            raw.setdefault(user, []).append((time, item))
    ids = dataset.catalogue["item_id"].to_numpy()
    for n, user in enumerate(rows.users_R.tolist()):
        items = ids[rows.items_A[rows.offsets_R1[n] : rows.offsets_R1[n + 1]]].tolist()
        assert items == [item for _, item in sorted(raw[user], key=lambda action: action[0])]


@pytest.mark.data
def test_amazon_beauty_facts(test_data, tmp_path):
    folder = test_data("amazon-beauty")
    dataset = make_source("amazon-beauty").prepare(str(folder), str(tmp_path / "beauty"))
    assert (dataset.users, dataset.items, dataset.actions) == (22_363, 12_101, 198_502)
    assert not dataset.has_timestamps and dataset.read_block(0).lengths_R.min() >= 5
    assert dataset.catalogue["item_id"].to_pylist() == list(range(1, 12_102))
    assert dataset.catalogue["asin"].null_count == 0


def test_ml_1m_form(tmp_path):
    source = tmp_path / "zip"
    source.mkdir()
    with zipfile.ZipFile(source / "renamed.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::20::5::100\n1::3::4::100\n2::20::1::7\n")
        archive.writestr(
            "ml-1m/movies.dat", "3::Caf\xe9: the film::Drama|War\n20::B::X\n21::C::X\n".encode("latin-1")
        )
    dataset = make_source("ml-1m").prepare(str(source / "renamed.zip"), str(tmp_path / "out"))
    assert dataset.catalogue.to_pydict() == {
        "item_id": [3, 20, 21],
        "count": [1, 2, 0],
        "title": ["Café: the film", "B", "C"],
        "genres": ["Drama|War", "X", "X"],
    }
    rows = dataset.read_rows(0, 2)
    sequences = {
        u: rows.items_A[a:b].tolist() for u, a, b in zip(rows.users_R, rows.offsets_R1, rows.offsets_R1[1:])
    }
    assert sequences == {1: [1, 0], 2: [1]}
    seen = make_source("ml-1m", settings=["items=seen"]).prepare(
        str(source / "renamed.zip"), str(tmp_path / "seen")
    )
    assert seen.items == 2


def test_ml_20m_form(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,0.5,1112484676\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n2,"American President, The (1995)",Drama\n29,A,B\n30,C,D\n'
    )
    dataset = make_source("ml-20m").prepare(str(tmp_path), str(tmp_path / "out"))
    assert dataset.catalogue["title"].to_pylist() == ["American President, The (1995)", "A", "C"]
    rows = dataset.read_rows(0, 1)
    assert rows.items_A.tolist() == [1, 0] and rows.columns["value"].tolist() == [0.5, 3.5]


def test_amazon_books_counts_items_and_users_once(tmp_path):
    lines = []
    for user in range(6):  # item i0 has 6 ratings, i1 to i4 5 each (not user 5), i5 only one
        for item in range(5 if user < 5 else 1):
            lines.append(f"U{user},i{item},5.0,{100 - item}")
    lines += [
        "U5,i5,1.0,5",
        *(f"U5,rare{n},1.0,{n}" for n in range(3)),
    ]  # 5 ratings, but 1 of them on a frequent item
    lines += [f"V{n},rare9,1.0,5" for n in range(4)]
    (tmp_path / "ratings_Books.csv").write_text("\n".join(lines) + "\n")
    dataset = make_source("amazon-books").prepare(str(tmp_path), str(tmp_path / "out"))
    assert sorted(dataset.read_rows(0, dataset.users).users_R.tolist()) == [f"U{n}" for n in range(5)]
    assert dataset.catalogue.to_pydict() == {"item_id": [f"i{n}" for n in range(5)], "count": [5] * 5}
    assert dataset.read_rows(0, 1).items_A.tolist() == [4, 3, 2, 1, 0]
    stages = {
        s["stage"]: (s["actions"], s["users"], s["items"]) for s in dataset.manifest.provenance["stages"]
    }
    assert stages["minimum counts"] == (26, 6, 5) and stages["minimum length"] == (25, 5, 5)


def test_beauty_errors(tmp_path):
    file = tmp_path / "sequences.txt"
    for text, message in (
        (
            "1 2 3\n2 x\n",
            f"'{file}', line 2: '2 x': item 'x' is not a plain integer of 64 bits; fetch the file again, {ASIDE}",
        ),
        ("1 2 3\n1 4\n", f"'{file}', line 2: '1 4': user 1 has a line above; fetch the file again, {ASIDE}"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as error:
            make_source("amazon-beauty").prepare(str(tmp_path), str(tmp_path / "out"))
        assert str(error.value) == message
    file.write_text("7 9 8 9\n3 8\n")  # without titles
    dataset = make_source("amazon-beauty").prepare(str(tmp_path), str(tmp_path / "out"))
    assert dataset.catalogue.to_pydict() == {"item_id": [8, 9], "count": [2, 2]}


def test_program(tmp_path, checkout):
    (tmp_path / "log.csv").write_text("who,what,when\n1,a,3\n1,b,2\n,c,1\n")
    (tmp_path / "schema.yaml").write_text("columns: {user: who, item: what, time: when}\n")
    command = [
        sys.executable,
        str(checkout / "launch" / "prepare.py"),
        "log",
        "--source",
        str(tmp_path / "log.csv"),
    ]
    command += ["--schema", str(tmp_path / "schema.yaml"), "--out", str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert f"error: '{tmp_path / 'log.csv'}', line 4, column 'who': the value is missing;" in failed.stderr
    done = subprocess.run(
        [*command, "--set", "on_bad_rows=quarantine"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 users, 2 items, 2 actions" in done.stdout and "who: missing" in done.stdout
    assert "reading: 2" in done.stderr
