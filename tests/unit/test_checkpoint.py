"""Checkpoints: what was saved comes back to the bit, and no moment of saving or pruning leaves a run without one."""

import os
import resource
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gr.errors import UserError
from gr.processes import Axis, Processes
from gr.train import checkpoint, slices
from gr.train.cursor import Cursor
from gr.train.optimizers import SGD, AdamW
from gr.train.slices import Slices
from tests.unit.models_common import Tiny, engine_of, local_table, named, train_step

ALONE = Processes(torch.device("cpu"))


class Died(Exception):
    """Of a process, in the middle of something."""


def model_and_engine(kind="adamw", width=3, device="cpu", **changes):
    model = Tiny(local_table(7, width), **changes).place(torch.device(device))
    adamw, sgd = AdamW(AdamW.Config(lr=0.1)), SGD(SGD.Config(lr=0.1, momentum=0.9))
    return model, engine_of(model, adamw if kind == "adamw" else sgd)


def train(engine, steps):
    for step in range(steps):
        train_step(engine, [torch.tensor([step % 7, 3], device=engine.model.device)])


def save(folder, step, engine=None):
    engine = engine or model_and_engine()[1]
    train(engine, 1)  # a checkpoint of a step has moments
    return checkpoint.save(folder, engine.tensors(), Cursor("g", step=step), {}, ALONE)


def damage(path):
    victim = next(path.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")


def steps(folder):
    return [step for step, _ in checkpoint.listed(folder)]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path, kind):
    model, engine = model_and_engine(kind)
    train(engine, 5)
    cursor = Cursor("g", 1, 2, 5, "digest", 9, {"epoch": 0, "step": 3, "value": 0.5}, 1)
    path = checkpoint.save(tmp_path, engine.tensors(), cursor, {"a": 1}, ALONE)
    train(engine, 5)

    other, its_engine = model_and_engine(kind)
    assert checkpoint.load(path, other, its_engine) == cursor
    train(its_engine, 5)
    assert named(model).keys() == named(other).keys()
    for one, two in zip(named(model).values(), named(other).values(), strict=True):
        assert torch.equal(one, two)
        moments = engine.parts[0].optimizer.state[one]
        assert moments.keys() == its_engine.parts[0].optimizer.state[two].keys() and moments
        for moment, value in moments.items():
            found = its_engine.parts[0].optimizer.state[two][moment]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found)), moment


@pytest.mark.gpu
def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu(tmp_path):
    on_cpu, engine = model_and_engine()
    train(engine, 5)
    path = save(tmp_path, 5, engine)
    model, its_engine = model_and_engine(device="cuda")
    checkpoint.load(path, model, its_engine)
    train(engine, 1)
    train(its_engine, 1)
    for one, two in zip(named(on_cpu).values(), named(model).values(), strict=True):
        assert its_engine.parts[0].optimizer.state[two]["step"].device == two.device
        torch.testing.assert_close(one.detach(), two.detach().cpu())


def test_a_model_of_another_shape_is_refused(tmp_path):
    path = save(tmp_path, 1)
    sentence = r"parameter 'tables.items.weight' is \[7, 3\] in checkpoint .* and \[7, 4\]"
    for give in (0, 1):  # the model alone, and its engine too
        with pytest.raises(UserError, match=sentence):
            checkpoint.load(path, *model_and_engine(width=4)[: give + 1])
        with pytest.raises(UserError, match=r"has no parameter 'more\.weight'"):
            checkpoint.load(path, *model_and_engine(extra=True)[: give + 1])
    path = save(tmp_path, 2, model_and_engine(extra=True)[1])
    for give in (0, 1):
        with pytest.raises(UserError, match=r"has parameter 'more\.\w+', which this model has not"):
            checkpoint.load(path, *model_and_engine()[: give + 1])


@pytest.mark.parametrize("moment", ["replace", "rmtree"])
def test_saving_the_same_step_again_leaves_a_checkpoint_at_every_moment(tmp_path, monkeypatch, moment):
    """The process dies before each change of the folder in turn; what is left can always be loaded."""
    pair = model_and_engine()
    owner = os if moment == "replace" else shutil
    real = getattr(owner, moment)
    for deaths in range(1, 5):
        folder = tmp_path / str(deaths)
        save(folder, 4, pair[1])
        calls = 0

        def dies(*arguments, deaths=deaths, **options):
            nonlocal calls
            calls += 1
            if calls == deaths:
                raise Died
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, dies)
            try:
                save(folder, 4, pair[1])
            except Died:
                pass
            else:
                assert calls < deaths
        newest = checkpoint.newest(folder)
        assert newest is not None
        assert checkpoint.load(newest, *pair).step == 4
        save(folder, 5, pair[1])
        checkpoint.prune(folder, 1, 5, None)
        assert [p.name for p in folder.iterdir()] == ["step-00000005"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2, 8, best_step=2)
    assert steps(tmp_path) == [2, 6, 8]
    checkpoint.prune(tmp_path, 1, 8, best_step=None)
    assert steps(tmp_path) == [8]


def test_pruning_counts_no_damaged_checkpoint_of_a_later_step(tmp_path):
    """Training continued from step 4 because 9 was damaged: 9 must not push 6 out."""
    save(tmp_path, 4)
    damage(save(tmp_path, 9))
    assert checkpoint.newest(tmp_path).name == "step-00000004"
    save(tmp_path, 6)
    checkpoint.prune(tmp_path, 1, 6, None)
    assert steps(tmp_path) == [6]
    assert checkpoint.newest(tmp_path).name == "step-00000006"


def test_of_two_checkpoints_of_a_step_the_newer_counts(tmp_path):
    """A process died before the one that was replaced could be removed."""
    new = save(tmp_path, 4)
    shutil.copytree(new, tmp_path / f"{new.name}.replaced")
    assert checkpoint.newest(tmp_path) == new == dict(checkpoint.listed(tmp_path))[4]
    save(tmp_path, 6)
    checkpoint.prune(tmp_path, 1, 6, best_step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_cursors_digest_tells_every_batch_and_their_order():
    digests = []
    for batches in (["a", "b"], ["b", "a"], ["b"], ["a", "a", "b"]):
        cursor = Cursor("g")
        for batch in batches:
            cursor.advance(batch)
        digests.append(cursor.data_digest)
    assert len(set(digests)) == 4


@pytest.mark.parametrize("file", ["state.json", ".metadata", "complete.json"])
def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path, file):
    save(tmp_path, 1)
    (save(tmp_path, 2) / file).unlink()
    assert checkpoint.newest(tmp_path).name == "step-00000001"


@pytest.mark.parametrize("kind", ["whole", "slices"])
def test_large_tensors_are_saved_shared_out_and_each_is_read_once(tmp_path, monkeypatch, kind):
    """A part is read whole, to take a slice of it: none is large, however large the tensor is."""
    monkeypatch.setattr(slices, "PART_NUMBERS", 20)
    values = torch.arange(33 * 4, dtype=torch.float32).view(33, 4)
    given = (
        values if kind == "whole" else Slices(values.shape, [([0, 0], values[:10]), ([10, 0], values[10:])])
    )
    path = checkpoint.save(tmp_path, {"model/a": given}, Cursor("g", step=1), {}, ALONE)
    described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata["model/a"]
    assert [chunk.sizes.numel() for chunk in described.chunks] == [20] * 6 + [12]

    loads, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **how: loads.append(1) or real(*given, **how))
    part = Slices(values.shape, [([3, 0], torch.zeros(11, 4))])  # rows 3 to 13 lie in three parts
    with checkpoint.quiet():
        dcp.load({"model/a": part}, checkpoint_id=path, no_dist=True)
    assert torch.equal(part.rows(), values[3:14]) and len(loads) == 3


def test_of_a_large_tensor_that_all_have_each_saves_its_share():
    values = torch.arange(12.0).view(6, 2)
    small = torch.ones(3)
    parts = [slices.shared_out({"a": values, "b": small}, Axis(rank, 4)) for rank in range(4)]
    assert all(p["a"] is values for p in parts)  # it is not large
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "PART_NUMBERS", 4)
        parts = [slices.shared_out({"a": values, "b": small}, Axis(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([p["a"].rows() for p in parts]), values)
    assert [len(p["a"].rows()) for p in parts] == [1, 2, 1, 2] and all(p["b"] is small for p in parts)


def test_a_disk_without_room_is_a_sentence_and_older_checkpoints_stay(tmp_path):
    engine = model_and_engine()[1]
    before = save(tmp_path, 1, engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # no file may be larger
        with pytest.raises(
            UserError, match=r"step-00000002' can't be written on rank 0 \(File too large\): older"
        ):
            save(tmp_path, 2, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest(tmp_path) == before
    assert checkpoint.newest(tmp_path) != save(tmp_path, 2, engine) == checkpoint.newest(tmp_path)


def held(values):
    """A tensor in three parts, as two processes may have a table: two rows, and the rest cut by columns."""
    return Slices(values.shape, [([0, 0], values[:2]), ([2, 0], values[2:, :1]), ([2, 1], values[2:, 1:])])


@pytest.mark.filterwarnings("ignore")  # DCP tells every time that it runs in one process
@pytest.mark.parametrize("numbers", [1, 7, 1 << 24], ids=["row by row", "several", "whole"])
def test_parts_of_any_size_are_saved_and_loaded_into_others(tmp_path, monkeypatch, numbers):
    """Large ones in cuts, each at its own place."""
    monkeypatch.setattr(slices, "PART_NUMBERS", numbers)
    values = torch.arange(40.0).view(10, 4)
    rows = Slices.of_rows(values.shape, range(10), values.clone())
    assert torch.equal(rows.rows(), values)
    for name, saved in (("parts", held(values)), ("rows", rows)):
        dcp.save({"table": saved}, checkpoint_id=tmp_path / name, no_dist=True)
        parts, whole = torch.zeros(10, 4), torch.zeros(10, 4)
        for into in (held(parts), Slices.of_rows(whole.shape, range(10), whole)):
            dcp.load({"table": into}, checkpoint_id=tmp_path / name, no_dist=True)
        assert torch.equal(parts, values) and torch.equal(whole, values)
