"""Datasets and logs in a real S3 server: what is asked of it, what becomes of its faults, what is left of a failure."""

import gzip
import io
import re
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data import ranged, stores, writing
from gr.data.batches import Plan
from gr.data.dataset import SequenceDataset
from gr.data.loader import Arrow, Direct
from gr.data.making.sources.base import make_source
from gr.data.order import Order
from gr.data.sequences import Sequences
from gr.data.split import LeaveOneOut
from gr.data.writing import DatasetWriter
from gr.errors import UserError
from tests.object_store import ACCESS, SECRET, first
from tests.unit.logs_common import COLUMNS, NOW

PART = "sequences/part-00000.parquet"
USERS, BLOCK = 60, 8


def write(place, seed=0, **options):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    items = rng.integers(0, 50, total).astype(np.int32)
    writer = DatasetWriter(place, "set", block_rows=BLOCK, **options)
    columns = {"time": np.arange(total) + NOW, "noise": rng.random(total), "page": rng.random(total)}
    writer.add(Sequences.of(np.arange(USERS), offsets, item=items, **columns))
    return writer.finish(pa.table({"item_id": np.arange(50), "count": np.bincount(items, minlength=50)}))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write(tmp_path_factory.mktemp("local") / "set")


@pytest.fixture
def url(local, store):
    """The dataset in the store, put there behind the programs' back."""
    for file in local.path.rglob("*"):
        if file.is_file():
            store.put(f"data/set/{file.relative_to(local.path)}", file.read_bytes())
    return "s3://data/set"


def epoch(dataset, engine=Arrow, columns=frozenset({"time"})):
    order = Order(dataset.manifest.fingerprint, 3, dataset.users, BLOCK, 3)
    plan = Plan(LeaveOneOut(LeaveOneOut.Config()), order, 9, 12, columns=columns)
    return [batch.digest for batch in engine(engine.Config(), dataset, plan).epoch(0)]


def of_part(asked):
    return asked.method == "GET" and asked.key.endswith(PART)


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [Arrow, Direct])
def test_a_row_group_is_one_request_for_the_columns_that_are_needed(local, url, store, engine, monkeypatch):
    monkeypatch.setattr(ranged, "HOLE", 64)
    dataset = SequenceDataset(url)
    assert len(store.asked) <= 6  # sizes and content of manifest and catalogue's footer, the list of files
    store.forget()
    assert epoch(dataset, engine) == epoch(local)
    footer = pq.read_metadata(local.path / PART)
    blocks = len(dataset.manifest.blocks)
    assert (
        blocks < len(store.asked) <= blocks + 2
    )  # the file is opened once in a process, its footer read once
    ranges = {asked.bytes for asked in store.gets(PART)}
    for block in range(blocks):
        spans = ranged.column_ranges(footer, [block], ["items", "timestamps"])
        assert (min(s for s, _ in spans), max(s for _, s in spans) - 1) in ranges
    needed = sum(b - a for a, b in ranged.column_ranges(footer, range(blocks), ["items", "timestamps"]))
    assert sum(a.size for a in store.gets(PART)) < needed + 65_536 + blocks * 64
    store.forget()
    assert epoch(dataset, engine) == epoch(local)
    assert len(store.asked) == blocks


def test_blocks_are_on_their_way_at_the_same_time(url, store):
    dataset = SequenceDataset(url)
    dataset.read_block(0)
    slow = []
    store.fault = lambda asked: slow.append(asked) or "slow"  # 0.4 s each
    import time

    start = time.monotonic()
    rows = Sequences.concatenate(dataset.read_blocks(range(len(dataset.manifest.blocks)), ["item"]))
    assert len(slow) == 8 and time.monotonic() - start < 0.5 * 8 * 0.4 and len(rows) == USERS


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_faults_that_pass_change_nothing(local, url, store, fault, monkeypatch):
    monkeypatch.setenv("GR_STORE_TIMEOUT", "0.5")
    store.fault = first(3, fault)  # of whatever
    dataset = SequenceDataset(url)
    store.fault = first(3, fault, of_part)
    assert epoch(dataset) == epoch(local)
    assert dataset.catalogue.to_pydict() == local.catalogue.to_pydict()


@pytest.mark.parametrize("fault", ["503", "stall", "cut"])
def test_faults_that_stay_are_one_sentence(url, store, fault, monkeypatch):
    monkeypatch.setenv("GR_STORE_TIMEOUT", "0.3")
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    dataset = SequenceDataset(url)
    dataset.read_block(0, ["item"])
    store.fault = lambda asked: fault if of_part(asked) else None
    with pytest.raises(UserError) as error:
        epoch(dataset)
    said = str(error.value)
    assert re.match(
        rf"cannot read item, time in row group \d of '{url}/{PART}' \(.*, at 2 attempts\): ", said
    )
    assert said.endswith("see to the store and the network, and run it again") and "\n" not in said
    store.fault = lambda asked: fault
    with pytest.raises(UserError, match=rf"cannot read '{url}/manifest.json' \(.*, at 2 attempts\): see to"):
        SequenceDataset(url)


def test_what_is_changed_or_removed_meanwhile_is_one_sentence(local, url, store):
    dataset = SequenceDataset(url)
    dataset.read_block(0, ["item"])
    whole = (local.path / PART).read_bytes()
    store.put(f"data/set/{PART}", whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"row group \d of '{url}/{PART}'"):
        epoch(dataset)
    store.put(f"data/set/{PART}", whole[:-9] + b"nonsense!")
    assert epoch(dataset)  # the footer is known, the rows are what they were
    store.delete(f"data/set/{PART}")
    with pytest.raises(UserError, match=rf"row group \d of '{url}/{PART}' .*: prepare the dataset again"):
        epoch(dataset)
    with pytest.raises(UserError, match=f"'{url}/{PART}' is missing: prepare the dataset again"):
        SequenceDataset(url)
    with pytest.raises(UserError, match="no sequence dataset at 's3://data/other'"):
        SequenceDataset("s3://data/other")


def test_without_credentials_the_sentence_says_so_at_once(url, store, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("GR_STORE_TIMEOUT", "7")  # another client, which has not seen them
    with pytest.raises(UserError, match=r"cannot read 's3://data/set/manifest.json' \(NoCredentialsError"):
        SequenceDataset(url)
    assert not store.asked


def test_where_arrows_client_is_refused_fsspecs_reads(local, url, store, monkeypatch):
    monkeypatch.setenv("GR_STORE_TIMEOUT", "8")  # clients of this test's own
    dataset = SequenceDataset(url)
    store.forget()
    store.fault = lambda asked: "403" if asked.method == "HEAD" and asked.key.endswith(PART) else None
    assert epoch(dataset) == epoch(local)
    store.fault = lambda asked: "403" if of_part(asked) else None
    with pytest.raises(
        UserError, match=r"in row group \d of .* \(.*\): see to your access to it, and run it again"
    ):
        epoch(dataset)


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_dataset_is_written_with_its_manifest_last(local, store):
    made = write("s3://data/new/set")
    assert made.manifest.digest == local.manifest.digest and str(made.path) == "s3://data/new/set"
    puts = [asked.key.removeprefix("data/new/set/") for asked in store.asked if asked.method == "PUT"]
    assert sorted(puts[:-1]) == ["catalogue.parquet", PART] and puts[-1] == "manifest.json"
    with pytest.raises(
        UserError, match="'s3://data/new/set' exists: choose another --out, or say --overwrite"
    ):
        write("s3://data/new/set")
    again = write("s3://data/new/set", seed=1, overwrite=True)
    assert again.manifest.fingerprint != made.manifest.fingerprint
    assert store.names("new/") == [f"new/set/{name}" for name in ("catalogue.parquet", "manifest.json", PART)]
    store.put("data/new/set/letter.txt", b"dear")
    with pytest.raises(UserError, match="is not a dataset that could be overwritten"):
        write("s3://data/new/set", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("ending", [PART, "manifest.json"])
def test_a_failure_leaves_what_was_there(store, monkeypatch, tmp_path, ending, overwrite):
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = f"s3://data/failing-{ending[:3]}-{overwrite}"
    before = write(place) if overwrite else None
    store.forget()
    store.fault = lambda asked: "503" if asked.method == "PUT" and asked.key.endswith(ending) else None
    with pytest.raises(
        UserError, match=rf"^cannot write the dataset to '{place}' \(.*, at 2 attempts\): see to"
    ):
        write(place, seed=1, overwrite=overwrite)
    store.forget()
    if before is None:
        assert store.names(place.removeprefix("s3://data/")) == []
    else:
        assert SequenceDataset(place).manifest == before.manifest
        assert len(store.names(place.removeprefix("s3://data/"))) == 3
    assert write(place, seed=1, overwrite=overwrite).users == USERS


# -- logs ----------------------------------------------------------------------------------------------------------


def log_files(store, name="log"):
    """Three Parquet files of two row groups: (name -> content)."""
    files = {}
    for n in range(3):
        content = io.BytesIO()
        rows = 200
        table = pa.table(
            {
                "u": np.arange(rows) % 37,
                "other": np.random.default_rng(n).random(rows),
                "i": (np.arange(rows) * 7 + n) % 50,
                "t": NOW + np.arange(rows) + 1000 * n,
            }
        )
        pq.write_table(table, content, row_group_size=100)
        files[f"{name}/part-{n}.parquet"] = content.getvalue()
        store.put(f"data/{name}/part-{n}.parquet", content.getvalue())
    return files


def prepare(source, out, **schema):
    return make_source("log", {"columns": COLUMNS, **schema}).prepare(str(source), str(out), overwrite=True)


def test_a_log_in_a_store_is_read_row_group_by_row_group(store, tmp_path):
    for name, content in log_files(store).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    there = prepare("s3://data/log", tmp_path / "there")
    assert there.manifest.fingerprint == prepare(tmp_path / "log", tmp_path / "here").manifest.fingerprint
    for n in range(3):
        asked = [a for a in store.asked if a.key == f"data/log/part-{n}.parquet"]
        assert [a.method for a in asked].count("HEAD") <= 3  # a sample of the rows, too, and each row group
        assert len([a for a in asked if a.method == "GET"]) == 4
    lines = gzip.compress(b"u,i,t\n" + b"".join(b"%d,%d,%d\n" % (n % 9, n % 5, NOW + n) for n in range(3000)))
    store.put("data/text/log.csv.gz", lines)
    (tmp_path / "log.csv.gz").write_bytes(lines)
    store.fault = first(2, "503", lambda asked: asked.method == "GET" and asked.bytes is not None)
    there = prepare("s3://data/text/*.csv.gz", "s3://data/of-text")
    assert (
        there.manifest.fingerprint == prepare(tmp_path / "log.csv.gz", tmp_path / "csv").manifest.fingerprint
    )


def test_faults_of_a_log_are_named(store, tmp_path, monkeypatch):
    monkeypatch.setenv("GR_STORE_ATTEMPTS", "2")
    files = log_files(store, "bad")
    name, content = "bad/part-1.parquet", files["bad/part-1.parquet"]
    start, _ = ranged.column_ranges(pq.read_metadata(io.BytesIO(content)), [1], ["u"])[0]
    where = rf"cannot read 's3://data/{name}', row group \d, columns 'u', 'i', 't' "

    def refused(said):
        with pytest.raises(UserError, match=said) as error:
            prepare("s3://data/bad", tmp_path / "out")
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)

    second = lambda asked: asked.key.endswith(name) and asked.bytes is not None and asked.bytes[0] == start  # noqa: E731
    store.fault = lambda asked: "503" if second(asked) else None
    refused(where + r"\(.* at 2 attempts\): see to the store and the network, and run it again")
    store.forget()
    store.put(f"data/{name}", content[:start] + bytes(40) + content[start + 40 :])
    refused(where + r"\(.*\): the file is damaged; write it again or leave it out")
    store.put(f"data/{name}", content[:-100])
    refused(rf"cannot read 's3://data/{name}' as Parquet \(.*\): check the file")
    store.put(f"data/{name}", content)

    def vanishing(asked):
        if second(asked):
            store.delete(f"data/{name}")

    store.fault = vanishing
    refused(where + r"\(.*\): the file went away while the log was read; put it back or leave it out")


# -- programs ------------------------------------------------------------------------------------------------------


def test_the_programs_work_with_urls_and_write_no_credentials(store, tmp_path, capsys):
    from gr.programs import describe, evaluate, prepare as program, recommend, train

    rng = np.random.default_rng(0)
    table = pa.table(
        {"u": rng.integers(0, 60, 900), "i": rng.integers(0, 40, 900), "t": NOW + np.arange(900)}
    )
    content = io.BytesIO()
    pq.write_table(table, content)
    store.put("data/raw/log.parquet", content.getvalue())
    (tmp_path / "schema.yaml").write_text("columns: {user: u, item: i, time: t}\n")
    made = "s3://data/made"
    log = ["log", "--source", "s3://data/raw", "--schema", str(tmp_path / "schema.yaml"), "--out", made]
    assert program.main(log) == 0
    assert program.main(log) == 2 and program.main([*log, "--overwrite"]) == 0
    assert describe.main([made]) == 0
    run = f"{tmp_path}/run"
    options = [f"data.path={made}", f"run.dir={run}", "train.max_steps=2", "train.threads=1", "model.dim=8"]
    options += ["train.global_batch=16", "log.tensorboard=false", "data.max_length=20"]
    assert train.main(["--config", "ml-1m/sasrec", *options]) == 0
    assert evaluate.main(["--run", run, "--json", f"{tmp_path}/results.json"]) == 0
    recs = tmp_path / "recs.parquet"
    assert recommend.main(["--run", run, "--users", "all", "--k", "3", "--out", str(recs)]) == 0
    assert pq.read_metadata(recs).num_rows == SequenceDataset(made).users
    assert any(key.startswith("made/counts/") for key in store.names("made/"))
    said = capsys.readouterr()
    written = [
        said.out.encode(),
        said.err.encode(),
        *(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()),
    ]
    written += [store.get(f"data/{key}") for key in store.names() if not key.startswith("raw/")]
    assert len(written) > 12
    for secret in (ACCESS, SECRET):
        assert not any(secret.encode() in content for content in written)


def test_what_a_url_carries_is_not_written(store, tmp_path):
    with pytest.raises(UserError, match="the URL of 's3://data/log' holds a password") as error:
        prepare("s3://me:secret@data/log", tmp_path / "out")
    assert "secret" not in str(error.value)
    signed = "https://host/log.parquet?X-Amz-Signature=secret"
    assert stores.all_shown({"source": [signed]}) == {"source": ["https://host/log.parquet"]}
    assert writing.all_shown is stores.all_shown
