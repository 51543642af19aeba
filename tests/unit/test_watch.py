"""Who is late, by what every rank tells of itself; what a run leaves for schedulers and for people."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

from gr import config as configs
from gr.errors import UserError
from gr.processes import Processes
from gr.train import job, watch
from gr.train.standing import Standing, late, slow, told, where
from tests.end_to_end.tiny import make_dataset, write_config

HOSTS = ["a", "a", "b", "b"]


def standings(*given: tuple[bool, int]) -> dict[int, Standing]:
    """Of step 7: whether each rank waits, and in its how manieth exchange."""
    phase = ("training", 7)
    return {
        rank: Standing(*phase, "all_reduce of _agree (x.py:1)" if waits else "step (x.py:2)", waits, count)
        for rank, (waits, count) in enumerate(given)
    }


def test_who_is_late():
    waiting, working = (True, 5), (False, 4)
    assert late(standings(waiting, waiting, working, waiting), {}) == [2]
    assert late(standings(waiting, (True, 3), waiting, waiting), {}) == [1], "it waits for something else"
    assert late(standings(waiting, waiting, working, waiting), {3: 9.0}) == [3], "nothing is heard of it"
    assert late(standings(waiting, waiting, waiting, waiting), {}) == []
    assert late(standings(working, working, working, working), {}) == [], "nobody waits"


def test_the_sentence_names_rank_host_and_what_the_others_do():
    found = standings((True, 5), (True, 5), (False, 4), (True, 5))
    assert told(found, {}, HOSTS) == (
        "late is rank 2 on b: training of step 7, in step (x.py:2); "
        "rank 0, 1, 3: training of step 7, in all_reduce of _agree (x.py:1)"
    )
    assert told(found, {2: 31.0}, HOSTS).startswith(
        "nothing is heard of rank 2 on b since 31 s (its process stands"
    )
    everybody = standings(*[(True, 5)] * 4)
    assert told({1: everybody[1]}, {}, HOSTS).startswith("others have not told yet: rank 1: ")
    assert told(everybody, {}, HOSTS).startswith(
        "all ranks are there and wait for the network: rank 0, 1, 2, 3: "
    )


def test_a_rank_that_works_much_longer_than_the_one_in_the_middle_is_slow():
    before = {rank: Standing(worked=10.0) for rank in range(4)}
    level = {rank: Standing(worked=10.0 + 4 + rank / 10) for rank in range(4)}
    assert slow(before, level, 10.0) is None
    assert slow(before, {**level, 2: Standing(worked=19.0)}, 10.0) == (2, 9.0 / 4.1)
    idle = {rank: Standing(worked=10.01 + (rank == 1) / 10) for rank in range(4)}
    assert slow(before, idle, 10.0) is None, "who does little holds up nobody"
    assert slow({0: Standing()}, {0: Standing(worked=9.0)}, 10.0) is None


def test_a_place_is_the_innermost_function_of_gr():
    frames = []

    def look(folder):
        frames.append(where(sys._getframe()))

    from gr.errors import program

    program(look)(None)
    place, waits = frames[0]
    assert place.startswith("wrapped (errors.py:") and not waits


class Others:
    """What rank 0 of two hears of the other: waiting like itself, until it is asked anew."""

    def __init__(self, own: watch.Watch) -> None:
        self.own, self.heard = own, standings((True, 5), (True, 5))[1]

    def ask(self):
        self.heard = standings((True, 5), (False, 4))[1]
        self.own._place, self.own._waits = "ask (watch.py:1)", False  # this rank is looked at meanwhile

    def view(self):
        return {1: self.heard}, {}

    def exchanges(self):
        return 5


def test_after_a_timeout_everybody_is_asked_anew_and_the_own_place_is_where_it_waited():
    own = watch.Watch(Processes(torch.device("cpu")))
    own.phase, own.step, own.hosts, own._others = "training", 7, HOSTS[1:3], Others(own)
    own._place, own._waits = "all_reduce of _agree (x.py:1)", True
    own._waited = own.standing()
    with pytest.raises(UserError) as refusal:
        own._explain(RuntimeError("[/x.cc:1] Timed out waiting 600000ms for recv operation to complete"))
    assert str(refusal.value) == (
        "an exchange took longer than train.timeout, 600 s: late is rank 1 on b: training of step 7, in step (x.py:2); "
        "rank 0: training of step 7, in all_reduce of _agree (x.py:1); go on with --resume"
    )
    assert not refusal.value.everywhere


def test_a_run_keeps_a_heartbeat_and_ends_its_threads(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watch, "HEART_SECONDS", 0.0)
    make_dataset(tmp_path / "data")
    config = configs.load(write_config(tmp_path, tmp_path / "data", tmp_path / "run"), ["train.max_steps=4"])
    before = threading.active_count(), list(logging.getLogger("gr").handlers)
    job.run(config)
    assert (threading.active_count(), logging.getLogger("gr").handlers) == before
    heart = json.loads((tmp_path / "run/heartbeat.json").read_text())
    assert heart.keys() == {"time", "step", "phase", "pid"} and (heart["step"], heart["phase"]) == (
        4,
        "ended",
    )
