"""Tables of features and open vocabularies: any number of processes and any tables train alike, and go on alike."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from gr.batch import Jagged
from gr.data.sequences import Sequences
from gr.data.writing import DatasetWriter
from gr.embeddings.vocabulary import OpenVocabulary
from gr.processes import processes
from gr.train.comparison import compare
from gr.train.exporting import export
from gr.train.folder import RunFolder
from gr.train.recommend import recommend
from gr.train.runs import open_run
from tests.distributed import rounding
from tests.distributed.group import in_group
from tests.distributed.jobs import run_jobs
from tests.end_to_end.tiny import assert_same_run, tensors_in, write_config
from tests.packages import needs

needs("torchrec")

SAVED, STEPS, LR = 5, 10, 0.01
ROWS = "{name: torchrec, sharding: row_wise}"
FEATURES = ", ".join(
    [
        "kind: {column: type, rows: 4}",
        "device: {column: device, rows: 7}",
        "age: {column: age, rows: 5}",
        "user: {derived: user}",
        "hour: {derived: hour_of_day}",
        "campaign: {column: campaign, rows: 48, vocabulary: {name: open, buckets: 4, admit_after: 2, waiting: 8}}",
        "city: {column: city, rows: 24, vocabulary: {name: open, buckets: 2}}",
        "tag: {column: tags, rows: 16, pooling: sum, vocabulary: {name: open, buckets: 2}}",
        "genre: {catalogue: genres}",
        "amount: {column: amount, number: log}",
        "model: {column: device, rows: 5, unseen: own_row}",
    ]
)
TABLES = ("kind", "device", "age", "user", "hour", "campaign", "city", "tag", "genre", "amount", "model")
SETTINGS = [
    *("model.input.dropout=0", "model.encoder.dropout=0", "data.window_blocks=1", "eval.splits=[valid]"),
    "eval.every_steps=5",
    *("train.micro_batch_actions=60", "checkpoint.every_steps=null", f"model.input.features={{{FEATURES}}}"),
]


def dealt(sharded: str = ROWS, elsewhere: str = "mapped") -> list[str]:
    """Overrides that put the rows of tables of every kind elsewhere than into each process's own memory."""
    where = dict.fromkeys(("device", "campaign", "genre", "amount"), sharded)
    where |= dict.fromkeys(("user", "city", "tag", "model"), elsewhere)
    return [f"model.table={sharded}", *(f"model.input.features.{n}.table={t}" for n, t in where.items())]


def make_dataset(path) -> None:
    """150 users of 2 to 29 actions, each on a device, in a campaign that comes and goes, with tags; users have ages,
    and items genres, or none."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 30, 150)
    actions = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = (np.repeat(rng.integers(0, 60, 150), lengths) + np.arange(actions)) % 60
    rows = Sequences.of(
        np.arange(150),
        offsets,
        item=items.astype(np.int32),
        time=1_000_000 + np.arange(actions) * 1800,
        type=rng.integers(0, 3, actions).astype(np.int32),
        device=(items % 7).astype(np.int64),
        amount=np.where(items % 4 == 0, np.nan, items - 20).astype(np.float32),
        campaign=rng.geometric(0.03, actions) * 10**15 - 2**62,
        city=np.array([f"city {n}" for n in rng.geometric(0.1, actions)], object),
        tags=Jagged(
            np.concatenate([[0], np.cumsum(items % 3)]),
            np.array([f"tag {n}" for n in rng.geometric(0.1, int((items % 3).sum()))], object),
        ),
    )
    rows.user_columns["age"] = rng.integers(0, 5, 150).astype(np.int32)
    writer = DatasetWriter(path, "tiny", block_rows=32, action_type_names=["a", "b", "c"])
    writer.add(rows)
    counts = np.bincount(items, minlength=60)
    genres = [None if n % 7 == 0 else list(range(n % 3)) for n in range(60)]
    writer.finish(pa.table({"item_id": np.arange(60), "count": counts, "genres": genres}))


def tensors(run, step=STEPS):
    return tensors_in(run / "checkpoints" / f"step-{step:08d}")


def train_rows(run):
    return [row for row in RunFolder(run).read_metrics() if row["kind"] == "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process (local tables) and of two (tables of all kinds): NUMBER-whole at once, NUMBER-resumed in two
    parts, NUMBER-moved with its second part on the other number of processes, and other tables."""
    path = tmp_path_factory.mktemp("features")
    make_dataset(path / "data")
    on = f"train.max_steps={STEPS}"

    def new(name: str, steps: int, tables: list[str]) -> dict:
        config = write_config(path, path / "data", path / name)
        return {"config": config, "overrides": [*SETTINGS, *tables, f"train.max_steps={steps}"]}

    def done(jobs: list[dict], processes: int) -> None:
        assert run_jobs(path, jobs, processes) == [[None] * processes] * len(jobs)

    done([new("1-whole", STEPS, []), new("1-saved", SAVED, [])], 1)
    for name in ("moved", "resumed"):
        shutil.copytree(path / "1-saved", path / f"1-{name}")
    started = [
        new("2-whole", STEPS, dealt()),
        new("2-moved", SAVED, dealt()),
        new("2-resumed", SAVED, dealt()),
    ]
    going_on = [
        {"resume": path / "2-resumed", "overrides": [on]},
        {"resume": path / "1-moved", "overrides": [on, *dealt()]},
    ]
    done([*started, *going_on], 2)
    to_one = {"resume": path / "2-moved", "overrides": [on, *dealt("mapped", "local")]}
    done([{"resume": path / "1-resumed", "overrides": [on]}, to_one], 1)
    return path


@pytest.mark.parametrize("name", ["2-whole", "2-moved", "1-moved"])
def test_any_number_of_processes_and_any_tables_train_alike(folder, name):
    expected, found = train_rows(folder / "1-whole"), train_rows(folder / name)
    exact = [key for key in expected[0] if key not in ("loss", "grad_norm")]
    assert {"unseen/campaign", "admitted/city", "evicted/city"} < set(exact)
    assert [{k: row[k] for k in exact} for row in found] == [{k: row[k] for k in exact} for row in expected]
    losses = [[row["loss"] for row in rows] for rows in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=rounding.of_losses(STEPS))
    ours, theirs = tensors(folder / name), tensors(folder / "1-whole")
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        assert ours[key].dtype == values.dtype
        if key.startswith("vocabulary/"):
            assert torch.equal(ours[key], values), key
        elif key.startswith("model/"):
            bound = rounding.of_weights(STEPS, rounding.adamw(LR))
            np.testing.assert_allclose(ours[key], values, atol=bound, rtol=0, err_msg=key)


@pytest.mark.parametrize("number", [1, 2])
def test_going_on_gives_the_same_bits(folder, number):
    assert_same_run(folder / f"{number}-resumed", folder / f"{number}-whole")


def test_ids_came_and_went(folder):
    last = train_rows(folder / "1-whole")[-1]
    assert last["evicted/campaign"] > 20 and last["evicted/city"] > 0 and 0 < last["unseen/campaign"] < 1
    there = tensors(folder / "1-whole")
    assert there["vocabulary/campaign/keys"].shape == (4, 12 + 8)
    assert {f"model/tables.{name}.weight" for name in TABLES} < there.keys()


def test_a_run_that_is_opened_knows_the_ids(folder):
    there = tensors(folder / "2-whole")
    with processes("cpu", threads=1) as alone:
        opened = open_run(folder / "2-whole", processes=alone)
        assert opened.model.vocabularies.keys() == {"campaign", "city", "tag"}
        for name, vocabulary in opened.model.vocabularies.items():
            for part, (_, _, values) in vocabulary.state().items():
                assert torch.equal(values, there[f"vocabulary/{name}/{part}"])


def answered(path: str) -> dict:
    """What a run, or its export, says: the rows of ids that it has seen and of others, and its metrics."""
    with processes("cpu", threads=1) as joined:
        opened = joined.together(lambda: open_run(path, processes=joined))
        ids = torch.cat([torch.arange(200) * 10**15 - 2**62, torch.arange(50) + 2**60])
        rows = {
            name: vocabulary.rows_of(ids).tolist() for name, vocabulary in opened.model.vocabularies.items()
        }
    result = compare(path, "valid").results["hstu"]
    return {"rows": rows, "metrics": {**result.metrics, "users": result.users}}


def test_an_export_knows_the_ids_and_scores_as_its_run_to_the_bit(folder, tmp_path):
    run, out = folder / "2-whole", tmp_path / "out"
    done = export(run, out, largest=300, overrides=["model.table=local"])
    entries = {part.key for parts in done.tensors.values() for part in parts if "campaign/keys" in part.name}
    assert entries == {"vocabulary/campaign/keys[0:3]", "vocabulary/campaign/keys[3:4]"}, "it was to be cut"
    assert export(run, tmp_path / "again", largest=300, overrides=["model.table=local"]).files == done.files
    there = tensors(run)
    joined = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    for part in ("keys", "counts"):
        found = [values for entries in joined for n, values in entries.items() if f"campaign/{part}" in n]
        assert torch.equal(torch.cat(found), there[f"vocabulary/campaign/{part}"][:, :12]), (
            "rows, nobody who waits"
        )
    lists = [tmp_path / "run.parquet", tmp_path / "export.parquet"]
    with processes("cpu", threads=1) as alone:
        for path, file in zip((run, out), lists, strict=True):
            recommend(open_run(path, processes=alone), file, k=20)
    assert pq.read_table(lists[0]) == pq.read_table(lists[1])
    of_run, of_export = answered(str(run)), answered(str(out))
    assert of_run["metrics"] == of_export["metrics"] and of_run["metrics"]["users"] > 100
    assert of_run["rows"] == of_export["rows"]
    assert len(set(of_run["rows"]["campaign"][-50:])) == 4, "nobody knows them: the first rows of buckets"
    for here in in_group(answered, 2, tmp_path / "two", str(out)):
        assert here["rows"] == of_run["rows"]
        assert here["metrics"] == pytest.approx(of_run["metrics"], rel=1e-3)  # they rank in shares


def learnt() -> list:
    """What two vocabularies say of a stream of which every process has a part: of all ids, and of the own ones."""
    found: list = []
    with processes("cpu", threads=1) as joined:
        rank, ranks = joined.world.rank, joined.world.size
        for evict in ("least_recently_seen", "least_often_seen"):
            config = OpenVocabulary.Config(buckets=6, admit_after=2, evict=evict, waiting=5)
            vocabulary = OpenVocabulary(config, "x", 48, joined)
            rng = np.random.default_rng(5)
            for step in range(40):
                ids = torch.from_numpy(np.minimum(rng.geometric(0.02, 30), 150) * 2**50 + step // 4)
                # one process may have nothing
                own = ids[rank * 30 // ranks : (rank + 1) * 30 // ranks] if step % 5 else ids[rank * 30 :]
                update = vocabulary.learn(own, step)
                found.append(joined.world.gather(update.rows).tolist())
                found += [sorted(update.restarted_N.tolist()), sorted(update.evicted_E.tolist())]
            asked = torch.arange(150) * 2**50 + torch.arange(150) % 10
            found.append(vocabulary.rows_of(asked).tolist())
            found.append(joined.world.sum(vocabulary.totals(), dtype=torch.int64))
            found.append([vocabulary.own.first, len(vocabulary.own.keys_GP)])
    return found


def test_the_mapping_is_the_same_on_any_number_of_processes(tmp_path):
    alone = learnt()
    assert alone[-2][1] > 20
    dealt = [alone.pop(len(alone) // 2 - 1), alone.pop()]
    assert dealt == [[0, 6], [0, 6]]
    for ranks in (2, 4):
        for rank, found in enumerate(in_group(learnt, ranks, tmp_path / str(ranks))):
            dealt = [found.pop(len(found) // 2 - 1), found.pop()]
            assert dealt == [[rank * 6 // ranks, (rank + 1) * 6 // ranks - rank * 6 // ranks]] * 2
            assert found == alone
