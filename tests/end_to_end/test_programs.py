"""The programs as a user starts them: a log to recommendations, a stream to its oracle, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import SequenceDataset
from gr.programs import reproduce
from gr.train import cells
from gr.train.folder import RunFolder
from tests.programs import in_ranks, run_python

ROOT = Path(__file__).resolve().parents[2]
USERS, ITEMS, ACTIONS, K = 60, 30, 900, 7
SMALL = [
    *("model.dim=16", "model.encoder.qk_dim=16", "model.encoder.v_dim=16", "objective.negatives=16"),
    *("train.global_batch=16", "train.threads=1", "log.tensorboard=false"),
]


def start(
    program: str, *arguments: object, folder: Path, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``launch/PROGRAM.py`` in ``folder``, under torchrun when there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*(torchrun if processes > 1 else []), ROOT / "launch" / f"{program}.py", *arguments]
    return run_python(words, folder=folder, environment=environment, timeout=120)


def run(program: str, *arguments: object, folder: Path, processes: int = 1) -> str:
    """What the program printed; it has to end well."""
    done = start(program, *arguments, folder=folder, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def title(item: str) -> str:
    return f"The [bold] {item.lower()}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A shop's log in two files, with ties in time, and its catalogue."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    users = np.concatenate([np.arange(USERS).repeat(3), rng.integers(0, USERS, ACTIONS - 3 * USERS)])
    items = (users * 5 + rng.integers(0, 8, ACTIONS)) % ITEMS
    log = pa.table(
        {
            "customer": [f"customer {u}" for u in users],
            "sku": [f"SKU-{i:03d}" for i in items],
            "ts": 1_700_000_000_000 + rng.integers(0, 40, ACTIONS) * 86_400_000,
            "event": np.array(["view", "buy"])[rng.integers(0, 2, ACTIONS)],
        }
    )
    (folder / "logs").mkdir()
    pq.write_table(log.slice(0, 500), folder / "logs" / "a.parquet")
    pq.write_table(log.slice(500), folder / "logs" / "b.parquet")
    known = [f"SKU-{i:03d}" for i in range(ITEMS)]
    pq.write_table(pa.table({"sku": known, "title": list(map(title, known))}), folder / "items.parquet")
    (folder / "schema.yaml").write_text(
        "columns: {user: customer, item: sku, time: ts, action_type: event}\n"
        "time_unit: ms\n"
        "catalogue: {path: items.parquet, item: sku}\n"
    )
    return folder


@pytest.fixture(scope="module")
def histories(folder) -> dict[str, list[str]]:
    """User -> items in order, read by other means: a stable sort of the log by time."""
    log = pa.concat_tables(pq.read_table(folder / "logs" / f) for f in ("a.parquet", "b.parquet")).to_pylist()
    found: dict[str, list[str]] = {}
    for action in sorted(log, key=lambda a: a["ts"]):
        found.setdefault(action["customer"], []).append(action["sku"])
    return found


@pytest.fixture(scope="module")
def prepared(folder) -> str:
    log = ["log", "--source", "logs/*.parquet", "--schema", "schema.yaml"]
    return run("prepare", *log, "--out", "data/shop", folder=folder)


@pytest.fixture(scope="module")
def trained(folder, prepared) -> str:
    """A few steps of a config that comes with gr; the run is in runs/shop."""
    config = ROOT / "configs" / "ml-1m" / "hstu.yaml"
    wanted = ["data.path=data/shop", "run.name=shop", "train.max_steps=9", *SMALL]
    return run("train", "--config", config, *wanted, folder=folder)


def test_prepare_keeps_every_action_in_order_under_its_raw_ids(folder, prepared, histories):
    assert f"{USERS} users, {ITEMS} items, {ACTIONS} actions" in prepared
    dataset = SequenceDataset(folder / "data" / "shop")
    ids = dataset.catalogue["item_id"].to_pylist()
    assert dataset.catalogue["title"].to_pylist() == [title(item) for item in ids]
    assert dataset.manifest.action_type_names == ["buy", "view"]
    rows = dataset.read_block(0)
    items = np.split(rows.items_A, rows.offsets_R1[1:-1])
    assert {u: [ids[i] for i in row] for u, row in zip(rows.users_R, items, strict=True)} == histories


def test_describe_shows_titles_and_health(folder, prepared):
    text = run("describe", "data/shop", "--samples", 2, "--plot", "shop.png", folder=folder)
    assert "The [bold] sku-0" in text and "buy, view" in text and "broken" not in text
    assert SequenceDataset(folder / "data" / "shop").manifest.fingerprint in text
    assert (folder / "shop.png").read_bytes().startswith(b"\x89PNG")


def test_training_leaves_a_whole_run_folder_and_says_what_is_next(folder, trained):
    found = RunFolder(folder / "runs" / "shop")
    kinds = Counter(row["kind"] for row in found.read_metrics())
    assert kinds["eval"] == 1 and kinds["train"] >= 1
    assert found.config.is_file() and found.environment.is_file() and (found.plots / "training.png").is_file()
    assert [p.name for p in found.checkpoints.iterdir() if p.name == "step-00000009"]
    assert "test, last epoch" in trained
    assert "python -m gr evaluate --run runs/shop --split test" in trained


def popularity_by_hand(histories: dict[str, list[str]]) -> dict[str, float]:
    """HR@10 and MRR of popularity on the last item, the user's earlier items out of the ranking."""
    counts = Counter(item for items in histories.values() for item in items[:-1])
    ranks = []
    for *earlier, target in histories.values():
        others = {f"SKU-{i:03d}" for i in range(ITEMS)} - set(earlier) - {target}
        higher = sum(counts[item] > counts[target] for item in others)
        ranks.append(1 + higher + sum(counts[item] == counts[target] for item in others) / 2)
    found = np.array(ranks)
    return {"hr@10": float((found <= 10).mean()), "mrr": float((1 / found).mean())}


def test_evaluate_agrees_with_training_with_counting_by_hand_and_with_two_processes(
    folder, trained, histories
):
    arguments = ["--baselines", "popularity,last_item", "--buckets", "--json"]
    text = run("evaluate", "--run", "runs/shop", *arguments, "one.json", folder=folder)
    run("evaluate", "runs/shop", *arguments, "two.json", folder=folder, processes=2)
    one, two = (json.loads((folder / f"{n}.json").read_text())["results"] for n in ("one", "two"))
    assert list(one) == ["popularity", "last_item", "hstu"] and f"{USERS} users" in text
    for metric, value in popularity_by_hand(histories).items():
        assert one["popularity"][metric] == pytest.approx(value, abs=1e-9)
    logged = RunFolder(folder / "runs" / "shop").read_metrics()[-1]
    for name in ("hr@1", "hr@10", "ndcg@10", "mrr"):
        assert one["hstu"][name] == pytest.approx(logged[name], abs=1e-9)
        assert two["hstu"][name] == pytest.approx(logged[name], abs=1e-9)
    for breakdown in one["hstu"]["buckets"].values():
        assert sum(bucket["users"] for bucket in breakdown) == USERS


def vectors(file: Path, key: str) -> dict[str, np.ndarray]:
    return {row[key]: np.array(row["vector"]) for row in pq.read_table(file).to_pylist()}


def test_recommendations_are_the_best_new_items_of_each_user(folder, trained, histories):
    wanted = ["--users", "all", "--k", K, "--exclude", "all", "--out", "recs.parquet"]
    files = ["--user-vectors", "users.parquet", "--item-vectors", "items.vectors.parquet"]
    run("recommend", "--run", "runs/shop", *wanted, *files, folder=folder)
    users, items = (
        vectors(folder / name, key)
        for name, key in (("users.parquet", "user_id"), ("items.vectors.parquet", "item_id"))
    )
    table = pq.read_table(folder / "recs.parquet").to_pylist()
    assert {row["user_id"] for row in table} == histories.keys() == users.keys() and len(table) == USERS
    for row in table:
        user, listed = row["user_id"], row["item_ids"]
        new = items.keys() - set(histories[user])
        assert len(listed) == len(set(listed)) == K and set(listed) <= new
        np.testing.assert_allclose(
            [items[i] @ users[user] for i in listed], row["scores"], rtol=1e-4, atol=1e-5
        )
        assert row["scores"] == sorted(row["scores"], reverse=True)
        left_out = max(items[i] @ users[user] for i in new - set(listed))
        assert left_out <= row["scores"][-1] + 1e-4


def test_recommendations_for_a_list_of_users(folder, trained, histories):
    (folder / "ids.txt").write_text("customer 7\n\ncustomer 3\ncustomer 7\n")
    wanted = ["--users", "ids.txt", "--k", ITEMS, "--exclude", "none", "--out", "few.parquet"]
    run("recommend", "runs/shop", *wanted, folder=folder)
    table = pq.read_table(folder / "few.parquet").to_pylist()
    assert {row["user_id"] for row in table} == {"customer 3", "customer 7"} and len(table) == 2
    assert all(sorted(row["item_ids"]) == [f"SKU-{i:03d}" for i in range(ITEMS)] for row in table)


def test_known_users_are_served_and_unknown_ones_listed(folder, trained):
    (folder / "asked.txt").write_text("customer 7\nnobody\ncustomer 3\nno one\nnobody\n")
    wanted = ["--users", "asked.txt", "--k", 3, "--out", "served.parquet"]
    text = run("recommend", "runs/shop", *wanted, folder=folder)
    assert text.splitlines() == [
        "wrote 2 users to served.parquet (step 9 of runs/shop)",
        "2 users are not in the dataset 'data/shop': they are listed in served.unknown-users.txt",
    ]
    served = pq.read_table(folder / "served.parquet")["user_id"].to_pylist()
    assert sorted(served) == ["customer 3", "customer 7"]
    assert (folder / "served.unknown-users.txt").read_text() == "nobody\nno one\n"
    (folder / "asked.txt").write_text("customer 7\n")
    assert "not in the dataset" not in run("recommend", "runs/shop", *wanted, folder=folder)
    assert not (folder / "served.unknown-users.txt").exists()


def test_the_runs_test_metrics_can_be_computed_from_its_recommendations(folder, trained, histories):
    wanted = ["--users", "all", "--k", ITEMS, "--held-out", "test", "--out", "tested.parquet"]
    run("recommend", "runs/shop", *wanted, folder=folder)
    rows = pq.read_table(folder / "tested.parquet").to_pylist()
    assert {r["user_id"]: r["target_id"] for r in rows} == {user: h[-1] for user, h in histories.items()}
    ranks = np.array([1.0 + r["item_ids"].index(r["target_id"]) for r in rows])
    logged = RunFolder(folder / "runs" / "shop").read_metrics()[-1]
    assert logged["kind"] == "eval" and logged["users"] == len(rows) == USERS

    def mean(
        gains: np.ndarray,
    ) -> float:  # gains are added up as whole numbers of 2**-32: in any order the same
        return int(np.round(gains * 2.0**32).sum()) / 2.0**32 / len(gains)

    for k in (1, 5, 10):
        assert logged[f"hr@{k}"] == mean(1.0 * (ranks <= k))
        assert logged[f"ndcg@{k}"] == mean(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0))
    assert logged["mrr"] == mean(1 / ranks)


def test_an_export_serves_elsewhere_without_its_run(folder, trained, tmp_path):
    """Taken, with the dataset, to where neither the run nor the path of its dataset is."""
    said = run("export", "--run", "runs/shop", "--out", "exported", folder=folder)
    assert said.startswith("exported step 9 of runs/shop to exported\n") and "model.safetensors" in said
    assert "python -m gr recommend --run exported --users all" in said
    shutil.move(folder / "exported", tmp_path / "model")
    shutil.copytree(folder / "data" / "shop", tmp_path / "dataset")
    moved = ["--run", "model", "--data-path", "dataset"]
    run("evaluate", *moved, "--json", "figures.json", folder=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())["results"]["hstu"]
    logged = RunFolder(folder / "runs" / "shop").read_metrics()[-1]
    assert {name: figures[name] for name in ("hr@10", "ndcg@10", "mrr", "users")} == {
        name: logged[name] for name in ("hr@10", "ndcg@10", "mrr", "users")
    }
    run("recommend", *moved, "--users", "all", "--k", K, "--out", "served.parquet", folder=tmp_path)
    assert len(pq.read_table(tmp_path / "served.parquet")) == USERS


REFUSALS = [
    ("export runs/shop --out data/shop", "'data/shop' exists: choose another --out, or remove it"),
    (
        "prepare log --source logs --schema schema.yaml --out data/shop",
        "'data/shop' exists: choose another --out, or say --overwrite",
    ),
    (
        "prepare log --source logs --schema schema.yaml --out new --set time_unit=s",
        "'{folder}/logs/a.parquet', row group 0, row 0, column 'ts': {first} is not before 2200-01-01 in time_unit "
        "'s'; set time_unit: ms if it is 2023-11-14 22:13:20, correct it, or say on_bad_rows=quarantine to put such "
        "rows aside",
    ),
    (
        "prepare log --source logs --schema schema.yaml --out new --set columns.user=custommer",
        "'{folder}/logs/a.parquet' has no column 'custommer': did you mean 'customer'?",
    ),
    (
        "prepare log --source logs --out new",
        "a log needs a schema: give --schema a YAML file that says which columns are the user, the item and the time "
        "(docs/your-own-data.md shows one)",
    ),
    (
        "prepare ml-1m --source http://127.0.0.1:9/ml-1m.zip --out new",
        "cannot fetch http://127.0.0.1:9/ml-1m.zip ([Errno 111] Connection refused): get ml-1m.zip from "
        "https://grouplens.org/datasets/movielens/1m, and give --source its path or the folder with ratings.dat and "
        "movies.dat",
    ),
    (
        "describe runs",
        "no sequence dataset at 'runs' (manifest.json is missing): make one with python -m gr prepare, or set "
        "data.path to one",
    ),
    (
        "evaluate data/shop",
        "no run at 'data/shop' (config.yaml is missing): runs are the folders that train.py writes",
    ),
    ("evaluate runs/shop --json none/out.json", "there is no folder 'none' to write 'out.json' in: make it"),
    (
        "recommend runs/shop --users strangers.txt --unknown refuse --out recs2.parquet",
        "1 of 2 users are not in the dataset 'data/shop', the first is 'nobody': take them out of the list, or prepare "
        "a dataset that has them",
    ),
    (
        "recommend runs/shop --users strangers.txt --out strangers.txt",
        "--out and --users are both 'strangers.txt': give each a file of its own",
    ),
]


def test_output_that_is_not_utf_8_lacks_signs_but_nothing_else(folder, prepared):
    done = start("describe", "data/shop", folder=folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "users" in done.stdout and "?" in done.stdout, done.stderr


@pytest.mark.parametrize(("line", "message"), REFUSALS, ids=[line for line, _ in REFUSALS])
def test_refusals_are_one_sentence_and_leave_nothing_behind(folder, trained, line, message):
    (folder / "strangers.txt").write_text("customer 7\nnobody\n")
    program, *arguments = line.split()
    done = start(program, *arguments, folder=folder)
    first = pq.read_table(folder / "logs" / "a.parquet").column("ts")[0].as_py()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {message.format(folder=folder, first=first)}\n"
    assert not (folder / "new").exists() and not (folder / "recs2.parquet").exists()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert (folder / "strangers.txt").read_text() == "customer 7\nnobody\n"


def test_several_processes_refuse_with_one_voice(folder, trained):
    done = start("evaluate", "runs/shop", "--checkpoint", "4", folder=folder, processes=2)
    message = "error: run 'runs/shop' has no checkpoint '4': it has last, best and the steps "
    assert done.returncode != 0 and done.stderr.count("error: run") == done.stderr.count(message) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "reproduce ml-1m --data data/shop --out refused",
            "reproduce starts the processes of its trainings itself: start it without torchrun, and say how many with "
            "--processes",
        ),
        (
            "prepare synthetic-dp --out refused",
            "prepare is one process: start it without torchrun, its result doesn't depend on how many read it",
        ),
        (
            "recommend runs/shop --users all --out refused",
            "recommend is one process: start it without torchrun, with a part of the users each if one isn't enough",
        ),
        (
            "index runs/shop --out refused",
            "index is one process: start it without torchrun, it measures one process",
        ),
    ],
)
def test_programs_of_one_process_refuse_torchrun_with_one_sentence(folder, trained, line, message):
    program, *arguments = line.split()
    done = start(program, *arguments, folder=folder, processes=2)
    assert done.returncode != 0 and done.stdout == ""
    assert [text for text in done.stderr.splitlines() if text.startswith("error: ")] == [f"error: {message}"]
    assert not (folder / "refused").exists()


def test_a_launcher_that_says_half_is_refused(folder, trained):
    done = start(
        "train", "--config", "ml-1m/hstu", "data.path=data/shop", folder=folder, RANK="1", WORLD_SIZE="2"
    )
    message = (
        "error: RANK (1) and WORLD_SIZE (2) are set and MASTER_ADDR and MASTER_PORT are not: start with torchrun, "
        "which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset them all\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_programs_by_name(folder, trained):
    """``python -m gr NAME`` is ``launch/NAME.py``; configs that ship are found by name."""

    def by_name(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_python(["-m", "gr", *arguments], folder=folder, timeout=60)

    listed = by_name().stdout
    for program in (ROOT / "launch").glob("*.py"):
        assert f"\n  {program.stem} " in listed
    shown, file = (
        by_name("train", "--config", "ml-1m/hstu", "data.path=x", "--print-config"),
        start("train", "--config", "configs/ml-1m/hstu.yaml", "data.path=x", "--print-config", folder=folder),
    )
    assert shown.returncode == 0 and shown.stdout == file.stdout != ""
    wrong = by_name("trian")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: gr has no program 'trian': did you mean 'train'?\n",
    )


TABLE = ["ml-1m", "--data", "data/shop", "--rows", "hstu", "--processes", "2", "--out", "tables", *SMALL]
TABLE += [
    "train.early_stopping={metric: mrr, patience: 50}",
    "eval.splits=[test, valid]",
    "log.every_steps=1",
]
TABLE += ["data.split.holdout=2", "train.epochs=15", "--no-selection"]


def test_a_table_is_stopped_goes_on_and_is_printed(folder, trained, monkeypatch, capsys):
    """SIGTERM to reproduce alone: its training, of two processes, saves; the same command goes on to the table (with
    forked processes, which spares their imports)."""
    monkeypatch.setenv("COLUMNS", "160")
    metrics = RunFolder(folder / "tables" / "ml-1m" / "hstu-seed1").metrics
    command = [sys.executable, str(ROOT / "launch" / "reproduce.py"), *TABLE]
    with (folder / "stopped.txt").open("w+") as text:
        process = subprocess.Popen(command, cwd=folder, stdout=text, stderr=text, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count('"train"') >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == 2
        text.seek(0)
        assert "was stopped; run the same command again to go on" in text.read()
    before = metrics.read_text()
    assert before.count('"train"') < 15 * 4

    def start(command, log=None, begun=None):
        ranks = in_ranks(command[len(cells.TORCHRUN) + 1 :], [folder, folder])
        print("".join(one.stdout + one.stderr for one in ranks))
        return max(one.returncode for one in ranks)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(cells, "exit_status", start)
    assert reproduce.main(TABLE) == 0
    done = capsys.readouterr().out
    assert "resuming" in done and metrics.read_text().startswith(before)
    rows = [r for r in RunFolder(metrics.parent).read_metrics() if r["kind"] == "eval"]
    best = max((r for r in rows if r["split"] == "valid"), key=lambda r: r["mrr"])
    (table,) = json.loads((folder / "tables" / "ml-1m" / "table.json").read_text())
    assert [r["step"] for r in table["chosen"]] == [best["step"]]
    assert f"chosen by valid mrr ({best['epoch'] + 1})" in done


def test_a_stream_is_ranked_beside_its_oracle(tmp_path):
    small = ["records=1500", "length=24", "items=300", "categories=10"]
    run("prepare", "synthetic-dp", "--out", "stream", "--set", *small, folder=tmp_path)
    config = ROOT / "configs" / "synthetic-dp" / "hstu-norab.yaml"
    run(
        "train",
        "--config",
        config,
        "data.path=stream",
        "run.dir=run",
        "train.max_steps=5",
        *SMALL,
        folder=tmp_path,
    )
    run("evaluate", "run", "--baselines", "oracle,popularity", "--json", "out.json", folder=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {r["users"] for r in results.values()} == {150}
    hits = {name: r["hr@50"] for name, r in results.items()}
    assert hits["oracle"] > 2 * max(hits["popularity"], hits["hstu"])
