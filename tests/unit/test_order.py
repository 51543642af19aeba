"""The order is a permutation, a pure function of its key, and independent of ranks and restarts."""

from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch

from gr.data.batches import Plan, share
from gr.data.dataset import SequenceDataset
from gr.data.deal import deal
from gr.data.loader import Arrow, Direct
from gr.data.order import Order, permute
from gr.data.sequences import Sequences, Stretches
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_permutation_that_depends_on_its_key(size):
    first, second = permute(np.arange(size), size, key=1), permute(np.arange(size), size, key=2)
    assert sorted(first) == list(range(size))
    if size > 50:
        assert (first != second).mean() > 0.8
        assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 4 / np.sqrt(size)  # 4 standard deviations
    one_by_one = [permute(np.array([i]), size, key=1)[0] for i in range(size)]
    assert one_by_one == first.tolist()


@pytest.mark.parametrize("rows,window_blocks", [(1, 1), (9, 2), (40, 3), (43, 3), (43, 100)])
def test_every_row_has_one_position_and_the_short_block_is_last(rows, window_blocks):
    order = Order("f", seed=1, rows=rows, block_rows=10, window_blocks=window_blocks)
    windows = [order.window(epoch=0, window=w) for w in range(order.windows)]
    ordinals = np.concatenate([o for _, o in windows])
    assert sorted(ordinals) == list(range(rows))
    assert all(len(o) == order.window_rows for _, o in windows[:-1])
    if rows % 10:
        assert windows[-1][0][-1] == rows // 10
    for blocks, inside in windows:
        assert set(inside // 10) == set(blocks.tolist())


def test_epochs_and_seeds_differ_and_a_stream_keeps_its_order():
    order = Order("f", seed=1, rows=100, block_rows=10, window_blocks=4)
    first = order.window(0, 0)[1].tolist()
    assert first == order.window(0, 0)[1].tolist()
    assert first != order.window(1, 0)[1].tolist()
    assert first != Order("f", 2, 100, 10, 4).window(0, 0)[1].tolist()
    stream = Order("f", 1, 100, 10, 4, shuffle=False)
    assert np.concatenate([stream.window(3, w)[1] for w in range(3)]).tolist() == list(range(100))


@pytest.mark.parametrize("window_blocks", [1, 20], ids=["windows of a block", "one window"])
@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"seed": 2}, {"epoch": 1}], ids=str)
def test_blocks_and_rows_hang_on_dataset_seed_and_epoch_each_by_itself(window_blocks, other):
    def positions(fingerprint="f", seed=1, epoch=0):
        order = Order(fingerprint, seed, rows=200, block_rows=10, window_blocks=window_blocks)
        return np.concatenate([order.window(epoch, number)[1] for number in range(order.windows)])

    one, two = positions(), positions(**other)
    if window_blocks == 1:  # each block's rows are together: the blocks' order, and that of the rows in each
        assert (one // 10).tolist() != (two // 10).tolist()
        rows = [{int(block[0]) // 10: block.tolist() for block in np.split(p, 20)} for p in (one, two)]
        assert all(rows[0][block] != rows[1][block] for block in range(20))
    else:  # the blocks are mixed: by chance a row's neighbour is of its block 9 times in 199
        assert one.tolist() != two.tolist()
        assert max((np.diff(p // 10) == 0).sum() for p in (one, two)) < 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    import pyarrow as pa

    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 57)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(0, 40, offsets[-1]).astype(np.int32)
    writer = DatasetWriter(tmp_path_factory.mktemp("d") / "set", "t", block_rows=8)
    writer.add(Sequences.of(np.arange(57), offsets, item=items, time=np.arange(offsets[-1])))
    return writer.finish(pa.table({"item_id": np.arange(40), "count": np.bincount(items, minlength=40)}))


def batches(dataset, rank=0, ranks=1, start=0, epoch=0, tail="keep", engine=Arrow):
    order = Order(dataset.manifest.fingerprint, 3, dataset.users, 8, window_blocks=2)
    split = LeaveOneOut(LeaveOneOut.Config())
    plan = Plan(split, order, global_batch=10, max_length=12, tail=tail)
    loader = engine(engine.Config(), dataset, plan, rank=rank, ranks=ranks)
    result = list(loader.epoch(epoch, start))
    assert len(result) == loader.in_epoch(epoch) - start
    return result


def test_global_batches_do_not_depend_on_ranks_or_restarts(dataset):
    whole = batches(dataset)
    assert sum(b.samples for b in whole) == 57
    assert [b.index for b in whole] == list(range(6))
    for start in range(7):
        assert [b.digest for b in batches(dataset, start=start)] == [b.digest for b in whole[start:]]
    for ranks in (2, 3, 4):
        shares = [batches(dataset, rank, ranks) for rank in range(ranks)]
        for k, batch in enumerate(whole):
            parts = [s[k] for s in shares]
            assert {p.digest for p in parts} == {batch.digest}
            together = sorted(o for p in parts for o in p.share.ordinals_B.tolist())
            assert together == sorted(batch.share.ordinals_B.tolist())
            counts = [p.share.sequences for p in parts]
            assert max(counts) - min(counts) <= 1


@pytest.fixture(scope="module")
def places(dataset):
    """The dataset under the URLs of two storages."""
    memory = fsspec.filesystem("memory")
    for file in dataset.path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/bucket/set/{file.relative_to(dataset.path)}", file.read_bytes())
    yield {"file": f"file://{dataset.path}", "memory": "memory://bucket/set"}
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("engine", [Arrow, Direct])
@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_every_ingest_from_everywhere_gives_the_same_batches(dataset, places, engine, where):
    opened = SequenceDataset({**places, "path": dataset.path}[where])
    assert opened.manifest == dataset.manifest
    assert opened.catalogue.to_pydict() == dataset.catalogue.to_pydict()
    for rank, ranks in ((0, 1), (1, 3)):
        expected = batches(dataset, rank, ranks, start=1, epoch=2)
        got = batches(opened, rank, ranks, start=1, epoch=2, engine=engine)
        assert [(b.index, b.samples, b.digest) for b in got] == [
            (b.index, b.samples, b.digest) for b in expected
        ]
        for one, other in zip(got, expected, strict=True):
            one, other = one.share, other.share
            assert one.lengths == other.lengths and one.columns.keys() == other.columns.keys() == {
                "item",
                "time",
            }
            for name in one.columns:
                assert one.columns[name].dtype == other.columns[name].dtype
                assert torch.equal(one.columns[name], other.columns[name])
            assert torch.equal(one.offsets_B1, other.offsets_B1)
            assert torch.equal(one.ordinals_B, other.ordinals_B)


def test_what_goes_wrong_with_a_url_is_one_sentence(dataset, places, tmp_path):
    memory = fsspec.filesystem("memory")
    for url, said in (
        ("memory://bucket/none", "no sequence dataset at 'memory://bucket/none' \\(manifest.json is missing"),
        ("nothing://bucket/set", "cannot open 'nothing://bucket/set' \\(Protocol not known: nothing"),
        ("s3://me:secret@bucket/set", "the URL of 's3://bucket/set' holds a password"),
    ):
        with pytest.raises(UserError, match=said) as error:
            SequenceDataset(url)
        assert "secret" not in str(error.value)
    memory.copy("/bucket/set", "/bucket/other", recursive=True)
    memory.pipe_file("/bucket/other/sequences/part-00000.parquet", b"PAR1 nonsense")
    other = SequenceDataset("memory://bucket/other")
    with pytest.raises(
        UserError, match=r"row group .* of 'memory://bucket/other/sequences/part-00000.parquet'"
    ):
        batches(other)
    memory.rm("/bucket/other/sequences/part-00000.parquet")
    with pytest.raises(UserError, match=r"'memory://bucket/other/sequences/part-00000.parquet' is missing"):
        SequenceDataset("memory://bucket/other")


def test_a_digest_tells_samples_their_order_and_their_items(dataset):
    rows = dataset.read_rows(0, 9)
    others = [
        dataset.read_rows(1, 10),
        rows.take(np.arange(9)[::-1]),
        replace(rows, columns={**rows.columns, "item": rows.items_A[::-1]}),
        replace(rows, ordinals_R=rows.ordinals_R + 1),  # of other users who did the same
    ]
    plan = Plan(LeaveOneOut(LeaveOneOut.Config()), Order("f", 3, 57, 8, 2), global_batch=9, max_length=12)
    assert len({share(plan, 0, Stretches.of(given), 0, 1).digest for given in (rows, *others)}) == 5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_dealt_by_their_cost(dataset, ranks):
    rows = dataset.read_rows(0, 40)
    plan = Plan(LeaveOneOut(LeaveOneOut.Config()), Order("f", 3, 57, 8, 2), global_batch=40, max_length=30)
    dealt = deal(rows.lengths_R, ranks)
    for rank in range(ranks):
        found = share(plan, 7, Stretches.of(rows), rank, ranks)
        assert (found.index, found.samples) == (7, 40)
        assert found.share.ordinals_B.tolist() == np.flatnonzero(dealt == rank).tolist()


def test_samples_are_the_latest_training_actions(dataset):
    seen = {}
    for batch in batches(dataset):
        share = batch.share
        offsets = share.offsets_B1.tolist()
        for i, ordinal in enumerate(share.ordinals_B.tolist()):
            seen[ordinal] = share.items_T[offsets[i] : offsets[i + 1]].tolist()
    rows = dataset.read_rows(0, 57)
    for i in range(57):
        whole = rows.items_A[rows.offsets_R1[i] : rows.offsets_R1[i + 1]].tolist()
        assert seen[i] == whole[: max(len(whole) - 2, 0)][-13:]


def test_tail_drop_leaves_the_short_batch_out(dataset):
    assert [b.samples for b in batches(dataset, tail="drop")] == [10] * 5
    assert [b.samples for b in batches(dataset)] == [10] * 5 + [7]
    order, split = Order("f", 3, 50, 8, 2), LeaveOneOut(LeaveOneOut.Config())
    for tail in ("drop", "keep"):  # of whole batches nothing is left over
        assert Plan(split, order, global_batch=10, max_length=12, tail=tail).in_epoch(0) == 5


def test_an_error_in_the_reading_thread_reaches_the_reader(dataset, tmp_path):
    import shutil

    shutil.copytree(dataset.path, tmp_path / "broken")
    (tmp_path / "broken/sequences/part-00000.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="row group"):
        batches(SequenceDataset(tmp_path / "broken"))


def test_dealing_levels_the_cost():
    lengths = np.random.default_rng(1).integers(1, 200, 128)
    for ranks in (2, 3, 4, 8):
        rank_of = deal(lengths, ranks)
        cost = np.bincount(rank_of, weights=lengths + 0.005 * lengths**2.0)
        counts = np.bincount(rank_of)
        assert counts.max() - counts.min() <= 1
        assert cost.max() / cost.min() < 1.02
    assert deal(np.array([5]), 4).tolist() == [0]
    # one sequence of 1000 actions costs more than two of 700 and 500: attention's share grows with the square
    assert deal(np.array([1000, 700, 500, 100, 90, 10]), 2).tolist() == [0, 1, 1, 0, 1, 0]
