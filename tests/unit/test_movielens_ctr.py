"""MovieLens-1M as impressions: which labels a mean is made of, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from gr import config as configs
from gr.data.describe import describe
from gr.data.describe_tables import counts_table, health_table, lengths_table
from gr.data.making.sources.base import make_source
from gr.data.making.sources.movielens_ctr import AGES, clean_means
from gr.errors import UserError
from gr.eval.tables import results_table
from gr.train.evaluation import Evaluation
from gr.train.parts import open_data

USERS, FILMS = 12, 9


def write_files(folder):
    rng = np.random.default_rng(0)
    pairs = [(u, f) for u in range(1, USERS + 1) for f in range(1, FILMS + 1) if rng.random() < 0.9]
    ratings = [f"{u}::{f * 2}::{rng.integers(1, 6)}::{978300000 + n}" for n, (u, f) in enumerate(pairs)]
    users = [f"{u}::{'FM'[u % 2]}::{AGES[u % 7]}::{u % 21}::48067" for u in range(1, USERS + 1)]
    films = [
        f"{f * 2}::Film {f}: a colon, é (1999)::{'Drama' if f % 2 else 'Drama|War'}"
        for f in range(1, FILMS + 2)
    ]
    for name, lines in (("ratings", ratings), ("users", users), ("movies", films)):
        (folder / f"{name}.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return ratings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctr")
    ratings = write_files(folder)
    out = {}
    for name, settings in (("leaky", ["leaky=true"]), ("clean", []), ("one", ["folds=1"])):
        out[name] = make_source("ml-1m-ctr", {}, settings).prepare(str(folder), str(folder / name))
    return folder, ratings, out


def rows_of(dataset):
    rows = dataset.read_rows(0, dataset.users)
    return {**rows.columns, "number": rows.users_R}


def test_every_rating_but_threes_is_a_row_with_its_fields(made):
    _, ratings, out = made
    rows = rows_of(out["leaky"])
    kept = {
        n: list(map(int, line.split("::"))) for n, line in enumerate(ratings, 1) if line.split("::")[2] != "3"
    }
    assert sorted(rows["number"].tolist()) == sorted(kept)
    ids = out["leaky"].catalogue.ids.to_pylist()
    for place, number in enumerate(rows["number"].tolist()):
        user, film, rating, _ = kept[number]
        assert ids[rows["item"][place]] == film and rows["label"][place] == (rating > 3)
        found = [rows[name][place] for name in ("user", "gender", "age", "occupation")]
        assert found == [user - 1, "FM".index("FM"[user % 2]), user % 7, user % 21]
    genres = out["leaky"].catalogue["genres"].to_pylist()
    assert genres == [[0] if i // 2 % 2 else [0, 1] for i in ids]
    again = rows_of(out["clean"])
    assert again["number"].tolist() == rows["number"].tolist(), "the protocols have the same split"


def shares(count):
    return round(0.64 * count), round(0.8 * count)


def scaled(values, train):
    low, high = values[:train].min(), values[:train].max()
    return (values - low) / (high - low)


@pytest.mark.parametrize(("name", "owner"), [("user_mean", "user"), ("item_mean", "item")])
def test_leaky_means_have_the_labels_of_their_own_part_the_tests_too(made, name, owner):
    rows = rows_of(made[2]["leaky"])
    train, held = shares(len(rows["label"]))
    means = []
    for place in range(len(rows["label"])):
        part = slice(0, held) if place < held else slice(held, None)
        same = rows[owner][part] == rows[owner][place]
        means.append(rows["label"][part][same].mean())
    np.testing.assert_allclose(rows[name], scaled(np.array(means), train), rtol=1e-6)


@pytest.mark.parametrize(("name", "owner"), [("user_mean", "user"), ("item_mean", "item")])
def test_leave_one_out_means_have_training_labels_but_the_rows_own(made, name, owner):
    rows = rows_of(made[2]["one"])
    train, _ = shares(len(rows["label"]))
    means = []
    for place in range(len(rows["label"])):
        same = np.flatnonzero(rows[owner][:train] == rows[owner][place])
        same = same[same != place]
        means.append(rows["label"][same].mean() if len(same) else rows["label"][:train].mean())
    np.testing.assert_allclose(rows[name], scaled(np.array(means), train), rtol=1e-6)


@pytest.mark.parametrize("folds", [1, 3, 10])
def test_a_clean_mean_does_not_change_with_the_rows_own_label_nor_with_held_out_ones(folds):
    rng = np.random.default_rng(1)
    label, owner, train = rng.integers(0, 2, 200), rng.integers(0, 15, 200), 150
    before = clean_means(label, owner, train, folds, 1)
    for place in range(0, 200, 7):
        other = label.copy()
        other[place] = 1 - other[place]
        after = clean_means(other, owner, train, folds, 1)
        known = owner[:train] == owner[place]
        if place >= train:
            np.testing.assert_array_equal(before, after)
        elif known.sum() > 1:  # alone it is given training's mean, as nobody
            assert before[place] == after[place]


def test_the_split_is_the_datasets_and_its_protocol_is_named(made, tmp_path):
    folder = made[0]

    def data_of(name, **split):
        raw = {
            "data": {"path": str(folder / name), "split": {"name": "impressions", **split}},
            "model": {"encoder": "gru4rec"},
            "optimizer": "sgd",
        }
        return open_data(configs.from_dict(raw))

    opened = data_of("leaky")
    opened.split.check_dataset(opened.dataset)
    assert opened.split.on(opened.dataset).describe() == {"protocol": "leaky"}
    train, held = shares(opened.dataset.users)
    counted = opened.catalogue.counted
    assert counted.users == counted.counts_I.sum() == train
    assert counted.targets == {"valid": held - train, "test": opened.dataset.users - held}
    other = data_of("clean", train=0.7)
    with pytest.raises(UserError, match=r"set data\.split\.train and data\.split\.valid to these"):
        other.split.check_dataset(other.dataset)


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("ratings", "1::2::7::978300000", "the rating is 7, and a rating is 1 to 5"),
        ("ratings", "1::2::five::978300000", "can't be read as lines of user::item::value::time"),
        ("ratings", "1::2", "can't be read as lines of user::item::value::time"),
        ("ratings", "99::2::5::978300000", "user 99, whom users.dat doesn't have"),
        ("ratings", "1::99::5::978300000", "film 99, which movies.dat doesn't list"),
        ("ratings", "1::2::::978300000", "value is missing"),
        ("ratings", "::2::5::978300000", "user is missing"),
        ("users", "1::F::25::1::48067", "lists user 1 more than once"),
        ("movies", "2::Another (1999)::Drama", "lists item 2 more than once"),
        ("users", "13::X::25::1::48067", "gender 'X' is none of F, M"),
        ("users", "13::F::30::1::48067", "age 30 is none of 1, 18"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, file, line, sentence):
    write_files(tmp_path)
    with (tmp_path / f"{file}.dat").open("a") as out:
        out.write(line + "\n")
    with pytest.raises(UserError) as refusal:
        make_source("ml-1m-ctr").prepare(str(tmp_path), str(tmp_path / "out"))
    assert sentence in str(refusal.value) and not (tmp_path / "out").exists()


def test_files_with_nothing_in_them_are_said(tmp_path):
    write_files(tmp_path)
    with pytest.raises(UserError, match=r"test=0.99 and valid=0.9 leave none of \d+ ratings to train on"):
        made = make_source("ml-1m-ctr", {}, ["test=0.99", "valid=0.9"])
        made.prepare(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "ratings.dat").write_text("1::2::3::978300000\n")
    with pytest.raises(UserError, match="has ratings of 3 alone"):
        make_source("ml-1m-ctr").prepare(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "movies.dat").write_text("")
    with pytest.raises(UserError, match=r"movies.dat' lists no film"):
        make_source("ml-1m-ctr").prepare(str(tmp_path), str(tmp_path / "out"))


def test_the_catalogues_mean_is_that_of_a_held_out_row(made):
    dataset = made[2]["clean"]
    rows = rows_of(dataset)
    _, held = shares(len(rows["label"]))
    means = dataset.catalogue["item_mean"].to_numpy()
    np.testing.assert_array_equal(means[rows["item"][held:]], rows["item_mean"][held:])


def test_its_rows_are_called_impressions(made):
    dataset = made[2]["clean"]
    rows, items = dataset.users, dataset.items
    assert dataset.manifest.counts == f"{rows:,} impressions, {items:,} items"
    found = describe(dataset)
    console = Console(file=io.StringIO(), width=200)
    for table in (counts_table(dataset, found), lengths_table(dataset, found), health_table(dataset, found)):
        console.print(table)
    text = console.file.getvalue()
    assert f"of {dataset.manifest.block_rows:,} impressions" in text and "columns of the impressions" in text
    assert "users" not in text and "nothing to predict from" not in text


def test_its_evaluations_are_of_impressions(made):
    config = configs.load(
        "ml-1m-ctr/dssm", [f"data.path={made[0] / 'clean'}", "eval.baselines=[prior]", "eval.exclude=none"]
    )
    data = open_data(config)
    evaluation = Evaluation(data.dataset, data.split, config, data.catalogue, judged_by="pointwise")
    (result,) = evaluation.baselines("test").values()
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table({"prior": result}, "title"))
    assert f"{result.users} impressions" in console.file.getvalue()
