"""A job that torchrun starts again goes on with its run by itself; any other command makes a run of its own."""

import re

import pytest

from gr import config as configs
from gr.errors import UserError
from gr.launcher import Attempt, attempt
from gr.train import job
from gr.train.folder import RunFolder
from tests.end_to_end.tiny import CONFIG, assert_same_run, make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("restarts") / "data"
    make_dataset(path)
    return path


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    """``config("train.epochs=1")``: the tiny config, in runs/ of an empty folder."""
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run=None, data=data).replace("{dir: None}", "{name: tiny}"))
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: configs.load(file, overrides)


@pytest.fixture
def started(monkeypatch):
    """``started("a", 1)``: torchrun has started job "a" again, for the first time."""

    def start(name, number=0):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

    return start


def dying_at(step):
    steps = []

    def after_step(folder):
        steps.append(1)
        if len(steps) == step:
            raise InterruptedError

    return after_step


def test_what_torchrun_says_of_a_job():
    assert attempt({}) == Attempt(None, 0)
    said = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert attempt(said) == Attempt("a", 2)
    assert attempt({**said, "GR_RESTART": "3"}) == Attempt("a", 5), "a scheduler has started torchrun again"
    again = {**said, "TORCHELASTIC_RUN_ID": "a-3", "GR_JOB": "a", "GR_RESTART": "3"}
    assert attempt(again) == Attempt("a", 5), "whose meetings have other names, and the job one"
    assert attempt({"GR_JOB": "a"}) == Attempt(None, 0), "torchrun hasn't started it"
    with pytest.raises(UserError, match="TORCHELASTIC_RESTART_COUNT is 'x', not a whole number"):
        attempt({**said, "TORCHELASTIC_RESTART_COUNT": "x"})


@pytest.mark.parametrize("where", ["named", "numbered"])
def test_a_job_that_is_started_again_goes_on_with_its_run(config, started, capsys, where):
    short = ["eval.splits=[]", "train.epochs=2"]
    whole = job.run(config(*short, "run.name=whole")).path
    chosen = [*short, *(["run.dir=here"] if where == "named" else [])]
    if where == "numbered":  # another job's run, and one that nobody's job made, have the first names
        started("other")
        job.run(config(*short, "train.max_steps=1"))
        job.run(config(*short, "train.max_steps=1"))
    started("mine")
    for number, step in enumerate((6, 5)):
        started("mine", number)
        with pytest.raises(InterruptedError):
            job.run(config(*chosen), on_step=dying_at(step))
    started("mine", 2)
    result = job.run(config(*chosen))
    assert str(result.path) == ("here" if where == "named" else "runs/tiny-3")
    assert re.findall(
        r"^resuming '(.+)' at epoch \d, step (\d+)$", capsys.readouterr().out, re.MULTILINE
    ) == [
        (str(result.path), "4"),
        (str(result.path), "8"),
    ]
    assert_same_run(result.path, whole)


def test_only_the_same_job_goes_on_and_with_the_same_config(config, started):
    started("mine")
    first = job.run(config("train.max_steps=2", "eval.splits=[]"))
    for name, number in (("mine", 0), ("other", 1)):
        started(name, number)
        assert job.run(config("train.max_steps=2", "eval.splits=[]")).path != first.path
    assert RunFolder.of_job(config(), "mine").path.name == "tiny-2"
    assert RunFolder.of_job(config(), "nobody") is RunFolder.of_job(config(), None) is None
    started("mine", 1)
    with pytest.raises(UserError, match=r"'optimizer.lr' cannot change on resume \(0.01 -> 0.5\)"):
        job.run(config("train.max_steps=2", "eval.splits=[]", "optimizer.lr=0.5"))
