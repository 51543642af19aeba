"""Item heads in a file: scores as the model's own, by all layers and the last one, and what a search in front finds."""

from __future__ import annotations

import pytest
import torch

from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.models.two_tower.scoring import Encoding, last_layer, score_all, score_some, search
from gr.programs import index as program
from gr.train import job
from gr.train.item_heads import ItemHeads, LastLayer, item_heads, measure, user_heads
from gr.train.runs import open_run
from tests.unit.models_common import generator
from tests.unit.test_two_tower_run import ITEMS, load, make_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    make_dataset(folder / "data", rows=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "plot_run", lambda folder, shown: None)
        path = job.run(load(folder, folder / "data", "train.epochs=1")).path
    return open_run(str(path))


def heads_of(users=3, items=50, heads=6, per_item=4, width=8, seed=1):
    g = generator(seed)
    user = torch.randn(users, heads, width, generator=g, dtype=torch.float64)
    return user, torch.randn(per_item, items, width, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("items", [1, 50, 2049])
def test_scores_of_all_items_are_those_of_pairs(items):
    user, heads = heads_of(items=items)
    pairs = (user[0] @ heads.permute(1, 2, 0)).amax(2).sum(1)
    torch.testing.assert_close(score_all(user[0], heads), pairs)
    some = torch.arange(0, items, 2)
    torch.testing.assert_close(score_some(user[0], heads, some), pairs[some])


def test_an_encoding_is_what_muvera_says():
    user, heads = heads_of(items=7, per_item=3)
    encoding = Encoding.of(8, repetitions=2, bits=2, projected=8)
    encoding = Encoding(encoding.planes_RBK.double(), encoding.signs_RKQ.double())

    def cell(head, planes):
        return sum(int(head @ plane > 0) << bit for bit, plane in enumerate(planes))

    def plainly(some, mean):
        found = []
        for planes, signs in zip(encoding.planes_RBK, encoding.signs_RKQ):
            cells = [cell(h, planes) for h in some]
            for number in range(4):
                inside = [h for h, c in zip(some, cells) if c == number]
                total = sum(inside, torch.zeros(8, dtype=torch.float64))
                if mean and inside:
                    total = total / len(inside)
                elif mean:
                    away = [bin(c ^ number).count("1") for c in cells]
                    total = some[away.index(min(away))]
                found.append(total @ signs)
        return torch.cat(found) / 2

    torch.testing.assert_close(encoding.of_user(user[0]), plainly(user[0], False))
    items_IE = encoding.of_items(heads)
    assert items_IE.shape == (7, encoding.dim)
    for item in range(7):
        torch.testing.assert_close(items_IE[item], plainly(heads[:, item], True))


def test_a_search_that_scores_everything_exactly_is_exact_and_better_than_luck_with_a_few():
    user, heads = heads_of(users=20, items=400, heads=4)
    user, heads = user.float(), heads.float()
    encoding = Encoding.of(8)
    encoded, found = encoding.of_items(heads), 0
    for user_HK in user:
        exact = score_all(user_HK, heads).topk(10)
        values, rows = search(user_HK, heads, encoding, encoded, 10, 400)
        assert rows.tolist() == exact.indices.tolist()
        torch.testing.assert_close(values, exact.values)
        _, few = search(user_HK, heads, encoding, encoded, 10, 80)
        found += len(set(few.tolist()) & set(exact.indices.tolist()))
    assert found > 2 * 20 * 10 * 80 / 400


def test_heads_in_a_file_score_as_the_model_does(run, tmp_path):
    item_heads(run).save(tmp_path / "heads")
    heads = ItemHeads.open(tmp_path / "heads")
    assert heads.heads_JIK.shape == (4, ITEMS, 4) and heads.layers == 2
    rows = run.data.dataset.read_rows(0, 64)
    from gr.data.collate import collate

    batch = collate(rows)
    users = user_heads(run.model, batch)
    scores = torch.stack([score_all(u, heads.heads_JIK) for u in users]) + heads.bias
    own = run.model.logits(batch)[:, 0]
    torch.testing.assert_close(scores[torch.arange(64), batch.items_T], own, rtol=1e-5, atol=1e-5)
    of_last = torch.stack([score_all(last_layer(u, 2), heads.heads_JIK) for u in users]) + heads.bias
    last = LastLayer(run.model).logits(batch)[:, 0]
    torch.testing.assert_close(of_last[torch.arange(64), batch.items_T], last, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(last, own)


def test_the_program_writes_and_measures(run, tmp_path, capsys):
    out = tmp_path / "heads"
    arguments = ["--run", str(run.folder.path), "--out", str(out), "--users", "5", "--k", "3"]
    assert program.main([*arguments, "--candidates", f"10,{ITEMS}", "--evaluate", "test"]) == 0
    said = capsys.readouterr().out
    assert "test, all layers: auc/like" in said and "test, last layer: auc/like" in said
    assert f"{ITEMS} items, 4 heads of 4 each" in said
    found = measure(run, ItemHeads.open(out), users=5, k=3, candidates=[ITEMS])
    assert found.users == 5 and found.recall == {ITEMS: 1.0} and 0 <= found.last_recall <= 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--users", "-1"], "--users is -1"),
        (["--k", "0"], "--k is 0"),
        (["--k", "5"], "--k is of a search that is measured: say for how many --users"),
        (["--candidates", "5,5"], "'5,5' is not a list of different numbers"),
        (["--candidates", "0"], "'0' is not a list of different numbers"),
        (["--out", "no/heads"], "there is no folder 'no'"),
    ],
)
def test_what_cannot_be_measured_or_written_is_said(run, tmp_path, monkeypatch, capsys, given, sentence):
    monkeypatch.chdir(tmp_path)
    try:
        assert program.main(["--run", str(run.folder.path), "--out", "heads", *given]) == 2
    except SystemExit as left:  # argparse
        assert left.code == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "heads").exists()


def test_heads_of_another_run_and_what_is_no_file_of_heads_are_refused(run, tmp_path):
    heads = item_heads(run)
    other = ItemHeads(heads.heads_JIK, heads.bias, heads.layers, heads.step + 1, heads.generation)
    with pytest.raises(UserError, match="write them again"):
        measure(run, other)
    (tmp_path / "text").write_text("no heads")
    with pytest.raises(UserError, match="can't be read as item heads"):
        ItemHeads.open(tmp_path / "text")


def test_an_item_field_or_number_that_the_catalogue_does_not_know_is_refused(run, tmp_path, monkeypatch):
    assert isinstance(run.data.dataset, SequenceDataset)
    monkeypatch.setattr(run.model.item, "numbers", ["mean"])
    with pytest.raises(UserError, match="the catalogue of the dataset has no such column"):
        item_heads(run)
