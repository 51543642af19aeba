"""Asynchronous checkpoints: of the moment that they were asked for, whatever moves meanwhile; and never two at once."""

import threading

import pytest
import torch

from gr.embeddings.mapped import MappedTable
from gr.embeddings.table import TableSpec
from gr.errors import UserError
from gr.processes import Axis, Processes
from gr.train import checkpoint, job, slices, snapshot, writer
from gr.train.aside import Aside
from gr.train.cursor import Cursor
from gr.train.folder import RunFolder
from gr.train.optimizers import AdamW, LazyAdam, RowwiseAdagrad
from gr.train.writer import CheckpointWriter
from tests.end_to_end.tiny import assert_same_run, tensors_in
from tests.unit.models_common import Tiny, engine_of, whole
from tests.unit.test_checkpoint import model_and_engine, train

ALONE = Processes(torch.device("cpu"))
BACKGROUND = "checkpoint.asynchronous=true"


@pytest.fixture
def held(monkeypatch):
    """``checkpoint.save`` waits until the event is set, and notes which steps it began with."""
    go, began, real = threading.Event(), [], checkpoint.save

    def save(folder, tensors, cursor, *given):
        began.append(cursor.step)
        assert go.wait(60)
        return real(folder, tensors, cursor, *given)

    monkeypatch.setattr(checkpoint, "save", save)
    return go, began


def writing(config, said=None):
    folder = RunFolder(config.run.dir)
    folder.path.mkdir(exist_ok=True)
    return CheckpointWriter(folder, config, ALONE, said.append if said is not None else lambda line: None)


def test_it_holds_the_state_of_its_moment(config, held):
    """Parameters, moments and the cursor move on while it is written; the file has what a synchronous one has."""
    go, began = held
    model, engine = model_and_engine()
    train(engine, 3)
    cursor, expected, said = Cursor("g", step=3, best={"step": 3}), engine.tensors(), []
    expected = {name: value.clone() for name, value in expected.items() if "tables" not in name}
    table = model.tables["items"].weight.detach().clone()
    with writing(config(BACKGROUND), said) as checkpoints:
        checkpoints.save(engine, cursor)
        train(engine, 3)
        cursor.step, cursor.best = 6, {"step": 6}
        checkpoints.poll()
        assert not said
        go.set()
    assert began == [3]
    path = checkpoint.newest(RunFolder(config().run.dir).checkpoints)
    assert path.name == "step-00000003"
    assert checkpoint.read_state(path)["cursor"]["best"] == {"step": 3}
    found = tensors_in(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items()) and expected
    assert torch.equal(found["model/tables.items.weight"], table)
    assert not torch.equal(table, model.tables["items"].weight)
    (line,) = said
    assert line.startswith("checkpoint of step 3: stalled ") and " s" in line.partition("written in ")[2]


def test_the_next_one_waits_for_the_one_before(config, held):
    go, began = held
    _, engine = model_and_engine()
    train(engine, 1)
    with writing(config(BACKGROUND)) as checkpoints:
        checkpoints.save(engine, Cursor("g", step=1))
        threading.Timer(0.2, go.set).start()
        checkpoints.save(engine, Cursor("g", step=2))
        (first,) = checkpoint.listed(RunFolder(config().run.dir).checkpoints)
        assert first[0] == 1, "the first was whole before the second began"
    assert began == [1, 2]
    assert [step for step, _ in checkpoint.listed(RunFolder(config().run.dir).checkpoints)] == [1, 2]
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


@pytest.mark.parametrize("here", [True, False], ids=["here", "on another process"])
def test_what_does_not_fit_is_written_in_step_and_said_once(config, monkeypatch, here):
    if here:
        monkeypatch.setattr(snapshot, "held_bytes", lambda tensors: 3 << 20)
    else:
        monkeypatch.setattr(Axis, "maximum", lambda self, refused: [1 for _ in refused])
    monkeypatch.setattr(writer, "Thread", None)
    _, engine = model_and_engine()
    train(engine, 1)
    said = []
    with writing(config(BACKGROUND, "checkpoint.copy_mib=2"), said) as checkpoints:
        checkpoints.save(engine, Cursor("g", step=1))
        assert checkpoint.newest(RunFolder(config().run.dir).checkpoints).name == "step-00000001"
        checkpoints.save(engine, Cursor("g", step=2))
    assert said == [
        "checkpoints are written while training waits: copies would take more than checkpoint.copy_mib, 2 MiB"
    ]


OPTIMIZERS = {
    "adamw": AdamW(AdamW.Config(lr=0.1)),
    "lazy_adam": LazyAdam(LazyAdam.Config(lr=0.1)),
    "rowwise_adagrad": RowwiseAdagrad(RowwiseAdagrad.Config(lr=0.1)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_that_move_are_put_aside_not_copied(config, held, optimizer, monkeypatch):
    """Of a table that keeps its rows to itself nothing is copied when a checkpoint is asked for."""
    monkeypatch.setattr(slices, "PART_NUMBERS", 6)  # two rows of three
    go, _ = held
    table = MappedTable(MappedTable.Config(), TableSpec("items", 7, 3, 1.0, 1, bias=True), ALONE)
    engine = engine_of(Tiny(table), OPTIMIZERS[optimizer])
    train(engine, 2)
    expected = {name: whole(tensor) for name, tensor in engine.tensors().items()}
    (row_optimizer,) = engine.row_optimizers.values()
    with writing(config(BACKGROUND)) as checkpoints:
        checkpoints.save(engine, Cursor("g", step=2))
        train(engine, 4)
        go.set()
        checkpoints.wait()
        assert row_optimizer.moving is None
    found = tensors_in(checkpoint.newest(RunFolder(config().run.dir).checkpoints))
    moved = {
        name for name, tensor in engine.tensors().items() if not torch.equal(whole(tensor), expected[name])
    }
    assert found.keys() == expected.keys() >= {"model/tables.items.bias", "model/tables.items.weight"}
    assert {"model/tables.items.weight", "model/layer.weight"} < moved
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_parts_read_in_any_order_between_any_moves_are_of_one_moment():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        values, moment = torch.randn(23, 3, generator=generator), torch.randn(23, 1, generator=generator)
        expected, found = {"values": values.clone(), "moment": moment.clone()}, {}
        aside = Aside(1 << 30)
        watched = {"values": aside.watch("piece", values, 4), "moment": aside.watch("piece", moment, 9)}
        reads = [(name, part) for name, w in watched.items() for part in range(len(w.unread_P))]
        for place in torch.randperm(len(reads), generator=generator).tolist():
            rows = torch.randperm(23, generator=generator)[: trial % 23].sort().values
            aside.before("piece", rows if trial % 3 else slice(trial % 5, 17))
            for tensor in (values, moment):
                tensor[rows if trial % 3 else slice(trial % 5, 17)] += 1
            name, part = reads[place]
            found[name, part] = watched[name].read(part)
        for name, tensor in expected.items():
            parts = [found[name, part] for part in range(len(watched[name].unread_P))]
            assert torch.equal(torch.cat(parts), tensor)


def test_training_waits_where_too_much_would_be_put_aside():
    values = torch.zeros(8, 4)
    aside = Aside(3 * (8 + 16))
    watched = aside.watch("piece", values, 4)
    aside.before("piece", torch.tensor([0, 1, 5]))  # three rows fit
    reader = threading.Timer(0.2, lambda: [watched.read(part) for part in (0, 1)])
    reader.start()
    aside.before("piece", torch.tensor([0, 5]))  # they are there already
    assert aside.waited == 0 and not watched.unread_P.logical_not().any()
    aside.before("piece", torch.tensor([2, 6]))
    assert not watched.unread_P.any() and aside.waited > 0.1
    aside.before("piece", slice(0, 8))  # all is read
    assert aside.taken == 3 * (8 + 16)
    aside = Aside(0)
    aside.watch("piece", values, 4)
    ending = threading.Timer(0.1, aside.end)
    ending.start()
    aside.before("piece", torch.tensor([1]))  # whoever was to read it has failed
    for thread in (reader, ending):
        thread.join()


def test_a_run_with_it_is_the_same_run(config, tmp_path):
    """To the bit, and so is one that goes on from the middle."""

    def dies(folder):
        steps.append(1)
        if len(steps) == 6:
            raise InterruptedError

    steps, short = [], ["train.epochs=1", "eval.splits=[]"]
    job.run(config(*short, f"run.dir={tmp_path / 'in-step'}"))
    job.run(config(BACKGROUND, *short, f"run.dir={tmp_path / 'whole'}"))
    assert_same_run(tmp_path / "whole", tmp_path / "in-step")
    with pytest.raises(InterruptedError):
        job.run(config(BACKGROUND, *short, f"run.dir={tmp_path / 'half'}"), on_step=dies)
    assert checkpoint.newest(tmp_path / "half" / "checkpoints").name == "step-00000004"
    job.resume(tmp_path / "half")
    assert_same_run(tmp_path / "half", tmp_path / "in-step")


def test_a_failure_is_raised_at_the_next_step_and_nothing_else_is_lost(config, monkeypatch):
    real, ninth = checkpoint.save, threading.Event()

    def save(folder, tensors, cursor, *given):
        if cursor.step < 8:
            return real(folder, tensors, cursor, *given)
        assert ninth.wait(60)  # one that fails sooner would be noticed before the ninth step
        raise UserError("the disk is full")

    def after_step(folder):
        steps.append(1)
        if len(steps) == 9:
            ninth.set()
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()

    steps, short = [], ["train.epochs=1", "eval.splits=[]"]
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match="the disk is full"):
        job.run(config(BACKGROUND, *short), on_step=after_step)
    assert len(steps) == 9, "the tenth step has not been taken"
    folder = RunFolder(config().run.dir)
    assert checkpoint.newest(folder.checkpoints).name == "step-00000004"
    monkeypatch.setattr(checkpoint, "save", real)
    assert job.resume(folder.path).finished


def test_the_last_one_is_waited_for_and_its_failure_raised(config, monkeypatch):
    def save(folder, tensors, cursor, *given):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", save)
    rare = ["checkpoint.every_steps=null", "eval.splits=[test]", "train.epochs=1"]
    with pytest.raises(UserError, match="the disk is full"):
        job.run(config(BACKGROUND, *rare))
