"""Windows made on a Ray cluster: the same batches as those read in the process, whatever dies or dawdles meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
import torch

from gr.data import cluster
from gr.data.batches import Plan
from gr.data.dataset import SequenceDataset
from gr.data.loader import Direct
from gr.data.periods import Chronological
from gr.data.remote import Ray
from gr.data.split import LeaveOneOut
from gr.errors import UserError
from gr.processes import Axis, Processes
from gr.train.folder import RunFolder
from tests.distributed.group import in_group
from tests.distributed.ray_windows import plan_of, write_dataset
from tests.end_to_end.tiny import make_dataset, train, write_config
from tests.packages import needs

needs("ray")


@pytest.fixture(scope="module")
def address():
    """One cluster for all tests, in a process of its own, and this process connected to it."""
    with cluster.started(cpus=2, store_mib=150) as address, cluster.joined(address):
        yield address


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("d") / "set")


def assert_equal(got: list, expected: list) -> None:
    assert [(b.index, b.samples, b.digest, b.skew) for b in got] == [
        (b.index, b.samples, b.digest, b.skew) for b in expected
    ]
    for one, other in zip((b.share for b in got), (b.share for b in expected), strict=True):
        assert one.lengths == other.lengths and one.columns.keys() == other.columns.keys()
        assert torch.equal(one.offsets_B1, other.offsets_B1) and torch.equal(one.ordinals_B, other.ordinals_B)
        for name, column in one.columns.items():
            assert column.dtype == other.columns[name].dtype and torch.equal(column, other.columns[name])
            column.add_(1)  # memory of its own: what Ray lends may not be written


class Run:
    """The ranks of a run in this process, on one actor."""

    def __init__(self, dataset: SequenceDataset, plan: Plan, ranks: int = 1, **settings):
        self.engines = [
            Ray(Ray.Config(**settings), dataset, plan, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        name = uuid4().hex
        self.sources = [engine.source(name, engine.rank, ranks) for engine in self.engines]
        self.direct = [
            Direct(Direct.Config(), dataset, plan, rank=rank, ranks=ranks) for rank in range(ranks)
        ]

    def read(self, rank: int, epoch: int = 0, start: int = 0):
        return self.engines[rank].read(self.sources[rank], epoch, start)

    def check(self, epoch: int = 0, start: int = 0) -> None:
        for rank, direct in enumerate(self.direct):
            assert_equal(list(self.read(rank, epoch, start)), list(direct.epoch(epoch, start)))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.kill(self.sources[0].actor)

    def kill_actor(self) -> None:
        import ray

        actor = self.sources[0].actor
        os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (1, {}),
        (2, {"global_batch": 60, "tail": "drop"}),  # batches of several windows
        (3, {"global_batch": 12}),  # no batch in two
        (4, {"global_batch": 500}),
        (8, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", ["core", "data"])
def test_every_rank_gets_the_batches_of_one_process(address, dataset, executor, ranks, sizes):
    with Run(dataset, plan_of(dataset, **sizes), ranks, executor=executor) as run:
        per_epoch = run.engines[0].in_epoch(1)
        run.check()
        run.check(epoch=1, start=per_epoch // 2)
        run.check(epoch=1, start=per_epoch)


@pytest.mark.parametrize("executor", ["core", "data"])
def test_periods_too_with_windows_that_have_nothing_of_them(address, dataset, executor):
    split = Chronological(Chronological.Config(period="3m", start=500)).on(dataset)
    plan = plan_of(dataset, split=split, global_batch=20, columns=frozenset({"time"}))
    assert plan.epochs is not None and plan.epochs > 5
    empty = [int((np.diff(plan.edges(epoch)) == 0).sum()) for epoch in range(plan.epochs)]
    assert any(empty) and len(set(empty)) > 1
    with Run(dataset, plan, 2, executor=executor) as run:
        for epoch in (0, 1, 4, plan.epochs - 1):
            run.check(epoch)
        run.check(epoch=3, start=1)


@pytest.mark.parametrize("executor", ["core", "data"])
def test_the_order_stays_when_tasks_dawdle_workers_die_and_the_actor_dies(
    address, dataset, tmp_path, executor
):
    marker = tmp_path / "killed"
    plan = plan_of(dataset, naps=0.2, killer=marker)
    with Run(dataset, plan, ranks=2, executor=executor) as run:
        expected = [list(direct.epoch(0)) for direct in _without_odds(run, dataset, plan)]
        got: list[list] = [[], []]
        readers = [run.read(rank) for rank in range(2)]
        for step in range(run.engines[0].in_epoch(0)):
            for rank, reader in enumerate(readers):
                got[rank].append(next(reader))
            if step == 8:
                run.kill_actor()
        assert marker.exists(), "no worker was killed"
        for rank, reader in enumerate(readers):
            assert next(reader, None) is None
            assert_equal(got[rank], expected[rank])


def _without_odds(run: Run, dataset: SequenceDataset, plan: Plan) -> list[Direct]:
    calm = replace(plan, split=LeaveOneOut(LeaveOneOut.Config()))
    return [Direct(Direct.Config(), dataset, calm, rank=rank, ranks=2) for rank in range(2)]


@pytest.mark.parametrize("executor", ["core", "data"])
def test_a_damaged_block_is_refused_in_the_words_of_the_arrow_engine(address, dataset, tmp_path, executor):
    shutil.copytree(dataset.path, tmp_path / "broken")
    file = next((tmp_path / "broken" / "sequences").iterdir())
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    file.write_bytes(content)
    broken = SequenceDataset(tmp_path / "broken")
    with Run(broken, plan_of(broken), executor=executor) as run:
        with pytest.raises(UserError) as expected:
            list(run.direct[0].epoch(0))
        with pytest.raises(UserError) as said:
            list(run.read(0))
    assert str(said.value) == str(expected.value) and "row group" in str(said.value)


def test_another_dataset_on_a_node_is_refused(address, dataset, tmp_path):
    other = write_dataset(tmp_path / "set")
    with Run(other, plan_of(other)) as run:
        shutil.rmtree(other.path)
        with pytest.raises(
            UserError, match=r"on node .*: no sequence dataset at .*every node must be able to read"
        ):
            list(run.read(0))
    make_dataset(other.path)
    with Run(other, plan_of(other)) as run:
        with pytest.raises(UserError, match=r"is another dataset on node .* \(generation .*, here .*\)"):
            list(run.read(0))


def test_a_window_that_does_not_come_in_time_is_one_sentence(address, dataset):
    with Run(dataset, plan_of(dataset, naps=60.0), timeout=1) as run:
        started = time.monotonic()
        with pytest.raises(
            UserError, match=r"window 0 of epoch 0 did not come .* within 1 s \(data.ingest.timeout\)"
        ):
            list(run.read(0))
        assert time.monotonic() - started < 30


def test_leaving_in_the_middle_waits_for_nothing(address, dataset):
    import ray

    with Run(dataset, plan_of(dataset, naps=1.0)) as run:
        batches = run.read(0)
        next(batches)
        batches.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "gr-read-ahead"]
        asked = ray.get(run.sources[0].actor.__ray_call__.remote(lambda self: self.asked[0]))
        assert asked < run.engines[0].plan.order.windows - 1, "it waited for all of the epoch"


def test_an_address_where_nothing_answers_is_one_sentence():
    program = (
        "from gr.data import cluster\nfrom gr.errors import UserError\n"
        "try:\n    with cluster.joined('127.0.0.1:1'):\n        pass\n"
        "except UserError as error:\n    print('said:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "said: no Ray cluster answers at '127.0.0.1:1'" in done.stdout, done.stderr


LOST = """
import ray  # before anything has told it to keep to itself
import os, signal, sys
from gr.data import cluster
from gr.data.dataset import SequenceDataset
from gr.data.remote import Ray
from gr.errors import UserError
from gr.processes import Processes
import torch
from tests.distributed.ray_windows import plan_of
from tests.end_to_end.tiny import descendants

dataset = SequenceDataset(sys.argv[1])
engine = Ray(Ray.Config(cpus=1, store_mib=100, ahead=1, timeout=5), dataset, plan_of(dataset))
try:
    with engine.opened(Processes(torch.device("cpu"))):
        print("at:", ray.get_runtime_context().gcs_address, flush=True)
        for batch in engine.epoch(0):
            if batch.index == 2:
                for pid in descendants(os.getpid()):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
except UserError as error:
    print("said:", error, flush=True)
os._exit(0)
"""


def test_a_dead_cluster_is_one_sentence_and_no_hang(dataset):
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(dataset.path)], capture_output=True, text=True, timeout=300
    )
    assert "at: 127.0.0.1:" in done.stdout, done.stderr
    assert "said: window" in done.stdout and "did not come from the Ray cluster" in done.stdout, done.stderr


def on_two_hosts() -> str:
    import socket

    import torch.distributed as dist

    rank = dist.get_rank()
    socket.gethostname = lambda: f"host-{rank}"
    everybody = Axis(rank, 2, dist.group.WORLD)
    try:
        with cluster.shared(None, Processes(torch.device("cpu"), everybody, everybody)):
            return "joined"
    except UserError as error:
        return str(error)


def test_several_hosts_need_a_cluster_that_runs(tmp_path):
    for said in in_group(on_two_hosts, 2, tmp_path / "group"):
        assert "are on 2 hosts (host-0, host-1)" in said and "ray start --head" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    make_dataset(path / "data")
    return path


@pytest.fixture(scope="module")
def in_process(folder):
    """What two ranks print that read in their processes, and the run's folder."""
    config = write_config(folder, folder / "data", folder / "arrow")
    return train(["--config", config, "train.epochs=2"], 2), RunFolder(folder / "arrow")


def test_two_ranks_train_alike_from_a_cluster_that_they_start(folder, in_process):
    config = write_config(folder, folder / "data", folder / "ray")
    on_ray = ["data.ingest=ray", "data.ingest.store_mib=100"]
    printed = train(["--config", config, "train.epochs=2", *on_ray], 2)
    for said in (printed, in_process[0]):
        assert "-bound: " in said and "the heaviest rank had 1." in said
        assert said.count("order digest") == 2
    assert RunFolder(folder / "ray").metrics.read_text() == in_process[1].metrics.read_text()


def test_a_run_goes_on_with_other_ranks_and_executors(address, folder, in_process):
    config = write_config(folder, folder / "data", folder / "changing")
    on_ray = ["data.ingest=ray", f"data.ingest.address={address}"]
    train(["--config", config, "train.epochs=2", *on_ray, "train.max_steps=7"], 2)
    train(["--resume", folder / "changing", "data.ingest.executor=data", "train.max_steps=null"])
    whole, changing = (
        [(r["step"], r["data_digest"]) for r in run.read_metrics() if "data_digest" in r]
        for run in (in_process[1], RunFolder(folder / "changing"))
    )
    assert whole == changing
