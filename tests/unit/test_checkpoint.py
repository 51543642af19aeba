"""Checkpoints: what was saved comes back to the bit, and no moment of saving or pruning leaves a run without one."""

import os
import shutil

import pytest
import torch
from torch import nn

from gr.errors import UserError
from gr.processes import Parallel
from gr.train import checkpoint
from gr.train.cursor import Cursor

ALONE = Parallel(0, 1, torch.device("cpu"))


def model_and_optimizer(kind="adamw", width=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, width), nn.Linear(width, 2))
    if kind == "adamw":
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([step % 7, 3])).square().sum().backward()
        optimizer.step()


def save(folder, step, pair=None):
    model, optimizer = pair or model_and_optimizer()
    return checkpoint.save(folder, model, optimizer, Cursor("g", step=step), {}, ALONE)


def damage(path):
    victim = next(path.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")


def steps(folder):
    return [step for step, _ in checkpoint.listed(folder)]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path, kind):
    model, optimizer = model_and_optimizer(kind)
    train(model, optimizer, 5)
    cursor = Cursor("g", 1, 2, 5, "digest", 9, {"epoch": 0, "step": 3, "value": 0.5}, 1)
    path = checkpoint.save(tmp_path, model, optimizer, cursor, {"a": 1}, ALONE)
    train(model, optimizer, 5)

    other, its_optimizer = model_and_optimizer(kind)
    assert checkpoint.load(path, other, its_optimizer) == cursor
    train(other, its_optimizer, 5)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for moment, value in optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(its_optimizer.state[two][moment])), (
                moment
            )


@pytest.mark.gpu
def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu(tmp_path):
    pair = model_and_optimizer()
    train(*pair, 5)
    path = save(tmp_path, 5, pair)
    model, _ = model_and_optimizer()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    checkpoint.load(path, model, optimizer)
    train(pair[0], pair[1], 1)
    model(torch.tensor([0, 3], device="cuda")).square().sum().backward()
    optimizer.step()
    for one, two in zip(pair[0].parameters(), model.parameters(), strict=True):
        assert optimizer.state[two]["step"].device == two.device
        torch.testing.assert_close(one.detach(), two.detach().cpu())


def test_a_model_of_another_shape_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"parameter '0.weight' is \[7, 3\] in checkpoint .* and \[7, 4\]"):
        checkpoint.load(path, model_and_optimizer(width=4)[0])
    with pytest.raises(UserError, match=r"has no parameter '2\.weight'"):
        checkpoint.load(path, model_and_optimizer()[0].append(nn.Linear(2, 2)))


@pytest.mark.parametrize("moment", ["replace", "rmtree"])
def test_saving_the_same_step_again_leaves_a_checkpoint_at_every_moment(tmp_path, monkeypatch, moment):
    """The process dies before each change of the folder in turn; what is left can always be loaded."""
    pair = model_and_optimizer()
    owner = os if moment == "replace" else shutil
    real = getattr(owner, moment)
    for deaths in range(1, 5):
        folder = tmp_path / str(deaths)
        save(folder, 4, pair)
        calls = 0

        def dies(*arguments, deaths=deaths, **options):
            nonlocal calls
            calls += 1
            if calls == deaths:
                raise InterruptedError
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, dies)
            try:
                save(folder, 4, pair)
            except InterruptedError:
                pass
            else:
                assert calls < deaths
        newest = checkpoint.newest(folder)
        assert newest is not None
        assert checkpoint.load(newest, *pair).step == 4
        save(folder, 5, pair)
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


@pytest.mark.parametrize("file", ["state.json", ".metadata", "complete.json"])
def test_a_checkpoint_without_one_of_its_files_is_skipped(tmp_path, file):
    save(tmp_path, 1)
    (save(tmp_path, 2) / file).unlink()
    assert checkpoint.newest(tmp_path).name == "step-00000001"
