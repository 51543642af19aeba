"""What processes must have in common, said in a sentence that names ranks and hosts."""

from __future__ import annotations

import pytest
import torch

from gr import config as configs
from gr.processes import Processes
from gr.train import preflight
from tests.end_to_end.tiny import make_dataset, write_config

HOSTS = ["node-a", "node-a", "node-b", "node-b"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(config, its facts on this machine)"""
    folder = tmp_path_factory.mktemp("preflight")
    make_dataset(folder / "data")
    config = configs.load(write_config(folder, folder / "data", folder / "run"))
    return config, preflight.facts(config, torch.device("cpu"))


def everybodys(facts, **of_last):
    """Four ranks' facts, the same but for those of the last one."""
    ranks = [{**facts, "host": host} for host in HOSTS]
    ranks[3] |= {name.replace("_", " "): value for name, value in of_last.items()}
    return ranks


def difference(own, **of_last):
    return preflight.difference_of(None, Processes(torch.device("cpu")), everybodys(own[1], **of_last))


def test_processes_that_are_alike_have_nothing_to_say(own):
    assert difference(own) == "" and preflight.doubts(everybodys(own[1])) == []
    assert own[1]["dataset"] and own[1]["config"] and own[1]["free GiB"] > 0


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("torch", "2.11.0", "torch is 2.11.0 on rank 3 (node-b) and {torch} on rank 0, 1, 2 (node-a, node-b): "),
        ("torchrec", "0.1", "torchrec is 0.1 on rank 3 (node-b) and "),
        ("code_of_gr", "ab", "code of gr is ab on rank 3 (node-b) and {code of gr} on rank 0, 1, 2"),
        ("dataset", "other", "dataset is other on rank 3 (node-b) and {dataset} on rank 0, 1, 2"),
        ("device", "cuda", "device is cuda on rank 3 (node-b) and cpu on rank 0, 1, 2"),
    ],
)  # fmt: skip
def test_what_must_be_equal_and_is_not(own, what, value, said):
    found = difference(own, **{what: value})
    assert found.startswith(said.format(**own[1])) and found.count("\n") == 0


def test_the_key_of_a_config_that_differs_is_named(own, monkeypatch):
    config, facts = own
    mine = preflight.flat(configs.to_dict(config))
    alone = Processes(torch.device("cpu"))
    monkeypatch.setattr(
        Processes, "everybodys", lambda self, value: [mine] * 3 + [{**mine, "optimizer.lr": 0.5}]
    )
    found = preflight.difference_of(config, alone, everybodys(facts, config="other"))
    assert found.startswith("the config's optimizer.lr is 0.5 on rank 3 (node-b) and 0.01 on rank 0, 1, 2 ")


@pytest.mark.parametrize(("seconds", "said"), [(30, "+30.0 s"), (-30, "-30.0 s")])
def test_what_may_differ_is_worth_a_word(own, seconds, said):
    clock = own[1]["clock"] + seconds
    words = preflight.doubts(everybodys(own[1], threads=7, clock=clock, free_GiB=0.25))
    assert len(words) == 3 and words[0].startswith("threads is 7 on rank 3 (node-b) and ")
    assert words[1].startswith(f"the clock of rank 3 on node-b is {said} from that of rank 0 on node-a")
    assert words[2].startswith("run.dir has 0.25 GiB left on node-b")
