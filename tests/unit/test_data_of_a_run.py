"""A run's data: the same losses wherever it lies and whoever reads it; what can't be trained on is refused first."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest

from gr import config as configs
from gr.data import popularity
from gr.data.dataset import SequenceDataset
from gr.errors import UserError
from gr.train import job, trainer
from gr.train.runs import open_run
from tests.end_to_end.tiny import CONFIG, make_dataset

SHORT = ("train.max_steps=12", "checkpoint.every_steps=null", "eval.splits=[test]")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def config(dataset, tmp_path):
    def make(name, *overrides):
        file = tmp_path / "tiny.yaml"
        file.write_text(CONFIG.format(run=tmp_path / name, data=dataset.path))
        return configs.load(file, [*SHORT, *overrides])

    return make


def numbers(result):
    times = ("seconds", "samples_per_second", "actions_per_second", "users_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in result.metrics]


def test_every_ingest_and_every_place_trains_alike(dataset, config):
    memory = fsspec.filesystem("memory")
    for file in dataset.path.rglob("*.*"):
        memory.pipe_file(f"/set/{file.relative_to(dataset.path)}", file.read_bytes())
    expected = numbers(job.run(config("arrow")))
    assert len(expected) > 10
    for name, *overrides in (
        ("direct", "data.ingest=direct"),
        ("file", f"data.path=file://{dataset.path}"),
        ("memory", "data.path=memory://set", "data.ingest=direct"),
    ):
        assert numbers(job.run(config(name, *overrides))) == expected, name
    assert list(memory.ls("/set/counts")), "what was counted is kept beside the dataset"
    memory.rm("/set", recursive=True)
    with pytest.raises(UserError, match=r"data.ingest.*'arow'.*did you mean 'arrow'"):
        config("typo", "data.ingest=arow")


def test_the_dataset_is_counted_once_and_not_to_recommend(dataset, config, monkeypatch):
    counted, count = [], popularity.count
    monkeypatch.setattr(popularity, "count", lambda *given: counted.append(1) or count(*given))
    split = "data.split={name: leave_one_out, holdout: 1}"  # not counted by another test
    for name in ("one", "two"):
        job.run(config(name, split, "eval.splits=[test]"))
    assert len(counted) == 1
    for file in (dataset.path / "counts").iterdir():
        file.unlink()
    seen, read = [], SequenceDataset._read
    monkeypatch.setattr(
        SequenceDataset, "_read", lambda self, block, infos: seen.append(block) or read(self, block, infos)
    )
    open_run(config("one").run.dir)
    assert not seen and len(counted) == 1, "opening a run reads no actions"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.split={name: global_time, valid_from: 1040000000, test_from: 1060000}"],
            r"data.split.valid_from is after data.split.test_from",
        ),
        (
            ["data.split={name: global_time, valid_from: 1040000000, test_from: 1060000000}"],
            r"split\.valid_from 1040000000 \(2002-12-16 .*\), they .* it looks like milliseconds, .* \(1040000\)$",
        ),
        (
            ["data.split={name: global_time, valid_from: 1040000, test_from: 2000000000}"],
            r"data\.split\.test_from 2000000000 .* are from 10\d{5} \(1970-01-12 .*\) to 11\d{5} \(1970-01-1.*\)",
        ),
        (
            [
                "data.split={name: global_time, valid_from: 1040000, test_from: 1040000}",
                "eval.splits=[valid]",
            ],
            r"no user of '.*set' has a held-out action in split 'valid'",
        ),
        (["data.split={name: records, train: 0}"], r"data.split leaves no training sequence of dataset"),
    ],
)
def test_a_split_that_does_not_fit_the_log_is_refused_before_the_first_step(
    config, monkeypatch, overrides, said
):
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match=said):
        job.run(config("refused", *overrides))


def test_times_of_the_manifest_are_those_of_the_log(dataset):
    rows = dataset.read_rows(0, dataset.users)
    assert rows.timestamps_A is not None
    span = (dataset.manifest.first_time, dataset.manifest.last_time)
    assert span == (int(np.min(rows.timestamps_A)), int(np.max(rows.timestamps_A)))
