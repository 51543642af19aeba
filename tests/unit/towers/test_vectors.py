"""Vectors of items that are kept: beside the dataset, and in files."""

from __future__ import annotations

from itertools import combinations

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr.embeddings.shares import Shares
from gr.errors import UserError
from gr.modality.content import Fixed, FixedShares
from gr.modality.digest import sketched, sums_of
from gr.modality.reader import TextReader, TextSection
from gr.modality.vectors import as_table, read_file
from gr.train.encoding import encode
from tests.packages import needs
from tests.towers import CPU, ITEMS, make_encoder, make_titled

needs("transformers")


def test_vectors_are_kept_beside_the_dataset_for_what_they_were_made_of(tmp_path, monkeypatch):
    """And are read where that is asked for again."""
    catalogue, encoder = make_titled(tmp_path / "data").catalogue, str(make_encoder(tmp_path / "encoder"))
    asked = [{}, {"pooling": "cls"}, {"max_tokens": 4}, {"fields": ["item_id"]}]

    def vectors_of(settings):
        return TextReader(TextSection(encoder=encoder, **settings), CPU).vectors(catalogue)

    found = [vectors_of(settings) for settings in asked]
    make_encoder(tmp_path / "encoder", seed=1)
    others = vectors_of({})
    assert not any(torch.equal(*pair) for pair in combinations([*found, others], 2))
    make_encoder(tmp_path / "encoder")
    monkeypatch.setattr(TextReader, "encoded", None)  # nothing is encoded any more
    assert all(torch.equal(vectors_of(settings), of) for settings, of in zip(asked, found, strict=True))


def test_files_of_vectors(tmp_path):
    ids, file = pa.array([4, 7, 9]), tmp_path / "v.parquet"
    pq.write_table(as_table(pa.array([9, 8, 4, 7]), torch.arange(8.0).view(4, 2)), file)
    assert read_file(str(file), ids).tolist() == [[4, 5], [6, 7], [0, 1]]
    fsspec.filesystem("memory").pipe_file("/v.parquet", file.read_bytes())
    assert read_file("memory://v.parquet", ids).tolist() == [[4, 5], [6, 7], [0, 1]]
    for where, sentence in (("memory://w.parquet", "no file"), ("abc://v.parquet", "Protocol not known")):
        with pytest.raises(UserError, match=sentence):
            read_file(where, ids)
    narrow = pa.table(
        {"item_id": pa.array([9, 8, 4, 7], pa.int32()), "vector": [[float(n)] for n in range(4)]}
    )
    pq.write_table(narrow, tmp_path / "narrow.parquet")
    assert read_file(str(tmp_path / "narrow.parquet"), ids).tolist() == [[2], [3], [0]]
    wide = pa.table({"item_id": pa.array([2**64 - 1], pa.uint64()), "vector": [[1.0]]})
    pq.write_table(wide, tmp_path / "wide.parquet")
    with pytest.raises(UserError, match="can't be one of the catalogue's"):
        read_file(str(tmp_path / "wide.parquet"), ids)
    with pytest.raises(UserError, match="no vector for 1 of 3 items"):
        read_file(str(file), pa.array([4, 5, 9]))
    lists = {
        "one length": [[1.0], [1.0, 2.0], [1.0]],
        "NaN": [[1.0], [float("nan")], [1.0]],
        "lists of floats": ["a", "b", "c"],
        "all the same": [[1.0, 2.0]] * 3,
    }
    for sentence, column in lists.items():
        pq.write_table(pa.table({"item_id": ids, "vector": column}), file)
        with pytest.raises(UserError, match=sentence):
            read_file(str(file), ids)
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="can't be read"):
        read_file(str(file), ids)


def test_a_sketch_is_a_sum_over_stretches(vectors_of_titles):
    """And the first items of a catalogue that has grown are known by it."""
    _, _, found = vectors_of_titles
    parts = [sums_of(found[a:b], a) for a, b in ((0, 7), (7, 7), (7, ITEMS))]
    whole = sketched("v", ITEMS, sums_of(found, 0))
    assert [sum(terms) for terms in zip(*parts)] == pytest.approx(sums_of(found, 0), rel=1e-9)
    assert not whole.differs(sketched("v", ITEMS, [sum(terms) for terms in zip(*parts)]))
    dealt = FixedShares(16, lambda: Shares(ITEMS, found, CPU.world), None, CPU, file="v")
    for content in (Fixed(16, lambda: found, None, torch.device("cpu"), file="v"), dealt):
        assert content.sketch() == whole and content.sketch(9) == sketched("v", 9, sums_of(found[:9], 0))
        assert content.sketch(9).differs(whole)
    assert whole.size == pytest.approx(found.norm().item())


def test_nothing_is_encoded_for_a_file_that_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TextReader, "encoded", None)
    section = TextSection(encoder=str(folder / "encoder"), batch=7)  # of which nothing has been kept
    for out, sentence in ((tmp_path, "is a folder"), (tmp_path / "no/v.parquet", "there is no folder")):
        with pytest.raises(UserError, match=sentence):
            encode(str(folder / "data"), section, str(out), CPU)
