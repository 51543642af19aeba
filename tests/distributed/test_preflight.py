"""Processes that look at each other before they train, and that name one that is late."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.distributed.group import in_group
from tests.end_to_end.tiny import make_dataset, write_config


def look(file: str) -> list:
    """What the doctor says on this rank, and where there are no data, then what a training with another rate on rank 1
    does, and one in which rank 1 comes late to an exchange: [status, said, status, said, refusal, seconds of the check,
    :func:`examined`, refusal, whether another rank says it]."""
    from gr import config as configs
    from gr.errors import UserError
    from gr.train import job, watch
    from gr.train.cluster_report import examine_cluster
    from gr.train.preflight import check_agreement

    rank = int(os.environ["RANK"])
    config = configs.load(file, ["train.timeout=3"])
    found = []
    try:
        with job.running(config) as joined:  # the group of all that follows
            with contextlib.redirect_stdout(io.StringIO()) as out:
                status = examine_cluster(config)
            found += [status, out.getvalue()]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                status = examine_cluster(configs.load(file, ["data.path=nowhere"]))
            found += [status, out.getvalue()]
            try:
                job.run(configs.load(file, [f"optimizer.lr={0.01 + rank}"]))
            except UserError as error:
                found += [str(error)]
            started = time.perf_counter()
            check_agreement(config, joined)
            found += [time.perf_counter() - started, examined(joined, rank)]
            with watch.Watch(joined):
                if rank == 1:
                    time.sleep(6)
                joined.world.sum([1.0])
    except UserError as error:
        found += [str(error), error.everywhere]
    return found


def examined(joined, rank: int) -> list:
    """What is found where rank 1 has a clock that is ahead by 50 s, and exchanges that bring it wrong numbers."""
    from gr.errors import UserError
    from gr.train import collectives

    exchange, *rest = collectives.KINDS["all-to-all"]
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(time=lambda: time.time() + 50 * rank, perf_counter=time.perf_counter)
        patch.setattr(collectives, "time", clock)
        patch.setattr(collectives, "KINDS", {"all-to-all": (lambda x, n: exchange(x, n) + rank, *rest)})
        offsets = collectives.clock_offsets(joined)
        with pytest.raises(UserError) as refusal:
            collectives.timed_exchanges(joined)
    return [offsets, str(refusal.value)]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    make_dataset(folder / "data")
    file = write_config(folder, folder / "data", folder / "run")
    return in_group(look, 2, folder / "group", str(file), by_hand=False), Path(folder / "run")


def test_the_doctor_looks_at_all_processes(said):
    ((status, text, without, missing, *_), (other, nothing, *_)), _ = said
    assert (status, other, nothing) == (0, 0, "")
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "barrier")
    assert all(f"{kind} " in text for kind in kinds) and "The processes fit together." in text
    assert without == 1 and "fit together" not in missing
    assert "error: no process finds a dataset at 'nowhere' (data.path): prepare it" in missing


def test_wrong_numbers_and_a_clock_that_is_ahead_are_found_by_all(said):
    ranks, _ = said
    for *_, (offsets, refusal), _, _ in ranks:
        assert offsets[0] == 0.0 and offsets[1] == pytest.approx(50, abs=5)
        assert refusal.startswith(
            "all-to-all on cpu brought wrong numbers to rank 1: look at the network's driver"
        )


def test_another_config_on_one_rank_is_refused_before_anything_is_made(said):
    ranks, run = said
    for _, _, _, _, refusal, *_ in ranks:
        assert (
            refusal.startswith("the config's optimizer.lr is 1.01 on rank 1 (")
            and "0.01 on rank 0" in refusal
        )
    assert not run.exists()


def test_who_is_late_is_named_by_one_that_waited(said):
    ((*_, refusal, everywhere), (*_, other, _)), _ = said
    assert refusal.startswith("an exchange took longer than train.timeout, 3 s: late is rank 1 on "), refusal
    assert "rank 0: starting, in all_reduce" in refusal and not everywhere
    assert other.startswith("rank 1 lost rank 0 on "), other


def test_looking_at_each_other_costs_little(said):
    ranks, _ = said
    assert max(seconds for _, _, _, _, _, seconds, *_ in ranks) < 1.0
