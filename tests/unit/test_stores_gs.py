"""Logs, datasets, runs and exports at gs:// URLs: a real server of Google's storage."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data import stores
from gr.data.dataset import SequenceDataset
from gr.data.making.sources.base import make_source
from gr.errors import UserError
from gr.programs import describe, evaluate, export, prepare, recommend, train
from tests.object_store import CloudStorage, first
from tests.unit.logs_common import COLUMNS, NOW

pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'gr[gs]'")
pytest.importorskip("gcp_storage_emulator", reason="its server is not installed: pip install 'gr[gs-tests]'")


@pytest.fixture(scope="module")
def server() -> Iterator[CloudStorage]:
    with pytest.MonkeyPatch.context() as patch:
        server = CloudStorage()
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        server.stop()


@pytest.fixture
def gs(server, monkeypatch):
    """fsspec's client of the server, without faults."""
    import fsspec

    monkeypatch.setattr(stores, "FIRST_PAUSE_S", 0.01)
    server.forget()
    return fsspec.filesystem("gs", endpoint_url=server.url)


def log(gs) -> pa.Table:
    """Three files below gs://data/log, beside the empty object that stands for a folder."""
    table = pa.table({"u": np.arange(600) % 37, "i": np.arange(600) * 7 % 50, "t": NOW + np.arange(600)})
    gs.pipe_file("data/log/dt=1/", b"")
    for n in range(3):
        content = io.BytesIO()
        pq.write_table(table.slice(200 * n, 200), content, row_group_size=70)
        gs.pipe_file(f"data/log/dt=1/part-{n}.parquet", content.getvalue())
    return table


def test_a_log_and_its_dataset_there_are_what_they_are_here(gs, server, tmp_path):
    pq.write_table(log(gs), tmp_path / "log.parquet")
    here = make_source("log", {"columns": COLUMNS}).prepare(
        str(tmp_path / "log.parquet"), str(tmp_path / "set")
    )
    for form in ("auto", "parquet"):
        made = make_source("log", {"columns": COLUMNS, "format": form})
        server.fault = first(2, "503", lambda asked: asked.method == "GET" and asked.bytes is not None)
        there = made.prepare("gs://data/log", "gs://data/set", overwrite=True)
        assert there.manifest.generation == here.manifest.generation
    assert sorted(gs.find("data/set")) == [
        f"data/set/{name}" for name in ("catalogue.parquet", "manifest.json", "sequences/part-00000.parquet")
    ]
    with pytest.raises(UserError, match="'gs://data/set' exists: choose another --out, or say --overwrite"):
        made.prepare("gs://data/log", "gs://data/set")
    with pytest.raises(UserError, match="--out 'gs://data/log/set' is in --source 'gs://data/log'"):
        made.prepare("gs://data/log", "gs://data/log/set")
    lines = b"".join(b"%d,%d,%d\n" % (n % 9, n % 5, NOW + n) for n in range(3000))
    gs.pipe_file("data/text/log.csv.gz", gzip.compress(b"u,i,t\n" + lines))
    text = make_source("log", {"columns": COLUMNS}).prepare("gs://data/text/*.gz", str(tmp_path / "text"))
    assert text.actions == 3000


def test_what_is_not_there_or_not_allowed_is_one_sentence(gs, server, caplog):
    log(gs)
    made = make_source("log", {"columns": COLUMNS})
    with pytest.raises(UserError, match="no data file at 'gs://data/none': check the path or the glob"):
        made.prepare("gs://data/none", "gs://data/out")
    with pytest.raises(UserError, match=r"^cannot write the dataset to 'gs://nobucket/out' \(.*\): see to"):
        made.prepare("gs://data/log", "gs://nobucket/out")
    with pytest.raises(UserError, match="no sequence dataset at 'gs://data/out'"):
        SequenceDataset("gs://data/out")
    server.forget()
    server.fault = lambda asked: "403" if "part-1" in asked.key else None
    with pytest.raises(UserError) as error:
        made.prepare("gs://data/log/dt=1/part-1.parquet", "gs://data/out")
    said = str(error.value)
    assert said.endswith("see to your access to it, and run it again") and "\n" not in said
    assert "attempts" not in said
    assert not [record for record in caplog.records if record.name.startswith("gcsfs")]


def test_the_programs_work_with_urls(gs, tmp_path):
    log(gs)
    (tmp_path / "schema.yaml").write_text("columns: {user: u, item: i, time: t}\n")
    data, run = "gs://data/made", "gs://data/runs/one"
    schema = str(tmp_path / "schema.yaml")
    assert prepare.main(["log", "--source", "gs://data/log", "--schema", schema, "--out", data]) == 0
    assert describe.main([data]) == 0
    settings = [f"data.path={data}", f"run.dir={run}", "train.max_steps=2", "train.threads=1", "model.dim=8"]
    settings += ["train.global_batch=16", "log.tensorboard=false", "log.plots=false", "data.max_length=20"]
    assert train.main(["--config", "ml-1m/sasrec", *settings, "eval.splits=[]"]) == 0
    assert train.main(["--resume", run, "train.max_steps=3"]) == 0
    steps = {name.split("/")[-2] for name in gs.find("data/runs/one/checkpoints")}
    assert "step-00000003" in steps
    out = "gs://data/exported"
    assert export.main(["--run", run, "--out", out]) == 0
    for place in (run, out):
        assert evaluate.main(["--run", place, "--json", "gs://data/results.json"]) == 0
        recs = ["--users", "all", "--k", "3", "--out", "gs://data/recs.parquet"]
        assert recommend.main(["--run", place, *recs]) == 0
        with gs.open("data/recs.parquet") as file:
            assert pq.read_table(file).num_rows == 37
