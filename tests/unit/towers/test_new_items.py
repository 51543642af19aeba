"""Items that the catalogue doesn't have."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.errors import UserError
from gr.programs.recommend import main
from gr.train import job
from gr.train.encoding import encode, read_tower
from gr.train.item_files import read_items
from gr.train.parts import build
from gr.train.recommend import recommend, unseen_items, write_item_vectors
from gr.train.runs import open_run
from tests.towers import CPU, ITEMS, SHORT, titles


def test_items_that_training_never_saw_are_recommended(folder, config, tmp_path):
    """Beside the others, with the score that a known item of the same text has; of a cached tower by their vectors."""
    tower = tmp_path / "tower.yaml"
    tower.write_text(f"encoder: {json.dumps(str(folder / 'encoder'))}\n")
    new, file = (
        pa.table({"item_id": [1007, 1011], "title": [titles()[7], titles()[11]]}),
        tmp_path / "new.parquet",
    )
    pq.write_table(new, file)
    section = read_tower(str(tower))
    written, count, width = encode(str(folder / "data"), section, str(tmp_path / "all.parquet"), CPU)
    of_new = encode(str(folder / "data"), section, str(tmp_path / "new-vectors.parquet"), CPU, str(file))
    assert (count, width, of_new[1:]) == (ITEMS, 16, (2, 16))
    towers = {
        "text": ({"name": "text"}, file),
        "cached": ({"name": "text", "mode": "cached", "text": None, "vectors": str(written)}, of_new[0]),
    }
    for name, (asked, items) in towers.items():
        result = job.run(config(asked, "train.max_steps=1", "eval.splits=[]", run=name))
        run = open_run(result.path)
        recommend(run, tmp_path / "recs.parquet", k=ITEMS + 2, exclude="none", new_items=items)
        write_item_vectors(run, tmp_path / "items.parquet", items)
        vectors = pq.read_table(tmp_path / "items.parquet").to_pylist()
        assert [row["item_id"] for row in vectors] == [*range(ITEMS), 1007, 1011]
        for known, unseen in ((7, ITEMS), (11, ITEMS + 1)):
            assert vectors[unseen]["vector"] == pytest.approx(vectors[known]["vector"], abs=1e-4)
        for row in pq.read_table(tmp_path / "recs.parquet").to_pylist()[:20]:
            scores = dict(zip(row["item_ids"], row["scores"], strict=True))
            assert len(scores) == ITEMS + 2 and row["scores"] == sorted(row["scores"], reverse=True)
            for known in (7, 11):
                assert scores[1000 + known] == pytest.approx(scores[known], rel=1e-4, abs=1e-4)
    with pytest.raises(UserError, match="give new items a column vector"):
        recommend(run, tmp_path / "recs.parquet", new_items=file)
    pq.write_table(new.set_column(0, "item_id", pa.array([1007, 11])), file)
    with pytest.raises(UserError, match="has 1 items that the catalogue knows"):
        recommend(run, tmp_path / "recs.parquet", new_items=file)


def test_the_program_encodes_them_once_and_says_by_how_many_numbers(folder, config, tmp_path, capsys):
    run = job.run(config({"name": "text"}, "model.similarity.matryoshka=[4]", *SHORT)).path
    pq.write_table(
        pa.table({"item_id": [1007, 1011], "title": ["red", "soap"]}), new := tmp_path / "new.parquet"
    )
    recs, vectors = tmp_path / "recs.parquet", tmp_path / "vectors.parquet"
    asked = {
        "--run": run,
        "--users": "all",
        "--new-items": new,
        "--out": recs,
        "--item-vectors": vectors,
        "--dim": 4,
    }
    capsys.readouterr()
    assert main([str(word) for pair in asked.items() for word in pair]) == 0
    said = capsys.readouterr()
    assert said.err.count("encoding items: 2 items in") == 1
    assert f"(step 1 of {run}, the first 4 numbers of vectors)" in said.out
    assert len(pq.read_table(vectors)) == ITEMS + 2


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([1007, 1007], "has 1 ids more than once (1007 is the first)"),
        ([1007, None], "has 1 items without an item_id"),
        (["1007", "abc"], "item_id 'abc' of '{file}' is not an integer id"),
        (["1007", ""], "item_id '' of '{file}' is empty"),
        (["0", "007"], "item_id '007' of '{file}' would become another id"),
        ([True, False], "column item_id of '{file}' is of type bool"),
        ([[1], [2]], "column item_id of '{file}' is of type list"),
    ],
)
def test_ids_of_new_items_are_ids(folder, config, tmp_path, ids, sentence):
    file, parts = tmp_path / "new.parquet", build(config({"name": "text"}), CPU)
    run = SimpleNamespace(model=parts.model, data=parts.data)
    pq.write_table(pa.table({"item_id": ids, "title": ["red", "blue"]}), file)
    with pytest.raises(UserError, match=re.escape(sentence.format(file=file))):
        unseen_items(run, file)


def test_columns_of_new_items_have_names_of_their_own(tmp_path):
    columns = [pa.array([1]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["item_id", "title", "title"]), tmp_path / "new.parquet")
    with pytest.raises(UserError, match="has several columns 'title'"):
        read_items(tmp_path / "new.parquet")


def test_a_tower_s_file_says_which_encoder(tmp_path):
    """A run's config, which somebody may give, says it further inside."""
    (tmp_path / "run.yaml").write_text("model: {item_tower: {name: text, text: {encoder: x}}}\n")
    with pytest.raises(UserError, match="names no encoder: write what stands under text, or image"):
        read_tower(str(tmp_path / "run.yaml"))


def test_a_file_of_new_items_has_to_be_there(tmp_path):
    with pytest.raises(UserError, match=r"no file '.*' with items"):
        read_items(tmp_path / "nowhere.parquet")
