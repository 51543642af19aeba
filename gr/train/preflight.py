"""Before training: whether all processes have the same packages, code, config and data, and what they run on.

One exchange of a few hundred bytes a rank, at every start with several processes; gr/train/collectives.py tries more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import gr
from gr import config as configs
from gr.config import RunConfig
from gr.data.folder import Folder
from gr.data.manifest import MANIFEST
from gr.data.stores import is_url
from gr.errors import UserError
from gr.launcher import host
from gr.modality.digest import digest_of as digest_of_tensors
from gr.models.model import Model
from gr.processes import Processes
from gr.train.environment import PACKAGES, installed_version

log = logging.getLogger(__name__)

CLOCK_SECONDS = 5.0
LEAST_FREE_GIB = 1.0
LISTED = 6
SHOWN = 12  # digits of a digest
SAME_EVERYWHERE = "install the same on all hosts"
SAME_FILES = "have the same files on all hosts"
REMEDIES = {
    "gr": SAME_EVERYWHERE,
    "code of gr": "use the same checkout on all hosts",
    "Python": SAME_EVERYWHERE,
    "device": "set train.device, or give every process a GPU",
    "config": "start all hosts with the same config and overrides",
    "dataset": "put one dataset where data.path leads to on all hosts",
}
"""What must be equal, in the order in which it is told, and what to do; every package is one too."""
WORTH_A_WORD = {
    "GPU": "the slower ones are waited for",
    "instruction set": "results differ in their last bits from those of hosts that are alike",
    "threads": "results differ in their last bits from those of hosts that are alike",
}
"""What may differ."""
MADE_OF = {
    "weights": "weights",
    "statistics": "running statistics",
    "settings": "settings",
    "tokenizer": "tokenizer",
}
"""Of an item tower's encoder what must be equal: digests, and what people call it."""


def check_agreement(config: RunConfig, processes: Processes) -> None:
    """Refuse to start where processes differ in what must be the same; say what else they differ in."""
    if processes.world.size == 1:
        return
    processes.barrier()  # clocks are read at about the same moment
    everybodys = processes.everybodys(facts(config, processes.device))
    if difference := difference_of(config, processes, everybodys):
        raise UserError(difference, everywhere=True)
    if processes.is_main:
        for said in doubts(everybodys):
            log.warning(said)


def difference_of(
    config: RunConfig | None, processes: Processes, everybodys: Sequence[Mapping[str, Any]]
) -> str:
    """What differs that must be the same, the first of it, in a sentence that all processes have; "" where nothing
    does.  everybodys: :func:`facts`, by rank."""
    for what in (*list(REMEDIES)[:3], *PACKAGES, *list(REMEDIES)[3:]):
        values = [one.get(what) for one in everybodys]
        if all(value == values[0] for value in values):
            continue
        if what == "config" and config is not None:
            key, values = _differing(processes.everybodys(flat(configs.to_dict(config))))
            return difference(f"the config's {key}", values, everybodys, REMEDIES["config"])
        return difference(what, values, everybodys, REMEDIES.get(what, SAME_EVERYWHERE))
    return ""


def check_towers(model: Model, processes: Processes) -> None:
    """Refuse to train where processes would form items' rows by other encoders, or from other vectors in a file.

    These are looked for by each process where it runs, on a disk of its host's own, in a package or in what was fetched
    from the hub at some time.  Nothing would bring other weights together again: gradients are sums, and what is frozen
    has none.  Every process calls this together, before anything has moved."""
    if processes.world.size == 1:
        return
    for table in model.tables.values():
        if not table.formed:
            continue
        weights = digest_of_tensors(dict(table.named_shared("")), table.outside_digest())
        own = {"weights": weights, **table.made_of()}
        found = processes.everybodys(({"host": host()}, own, table.sketch()))
        hosts = [one for one, _, _ in found]
        for what, called in MADE_OF.items():
            values = [digests.get(what, "")[:SHOWN] for _, digests, _ in found]
            if any(value != values[0] for value in values):
                said = f"the encoder of model.item_tower ({called})"
                raise UserError(difference(said, values, hosts, SAME_FILES), everywhere=True)
        first = found[0][2]
        for rank, (_, _, sketch) in enumerate(found):
            if first is not None and sketch is not None and sketch.differs(first):
                raise UserError(
                    f"'{first.file}' has other vectors on rank {rank} ({hosts[rank]['host']}) than on rank 0 "
                    f"({hosts[0]['host']}): {SAME_FILES}",
                    everywhere=True,
                )


def _differing(everybodys: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """The first key whose values differ, and those."""
    keys = dict.fromkeys(key for one in everybodys for key in one)
    found = ((key, [one.get(key) for one in everybodys]) for key in keys)
    return next((key, values) for key, values in found if any(value != values[0] for value in values))


def facts(config: RunConfig | None, device: torch.device) -> dict[str, Any]:
    """Of this process: what must be the same everywhere, and what may differ.  Without a ``config`` nothing is known of
    the data and of the run's folder."""
    found: dict[str, Any] = {"host": host(), "gr": gr.__version__, "code of gr": code_digest()}
    found["Python"] = platform.python_version()
    found |= {name: installed_version(name) for name in PACKAGES}
    found["torch"] = torch.__version__  # with its build
    found["device"] = device.type
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    found["instruction set"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = torch.get_num_threads()
    if config is not None:
        found |= {"config": digest_of(config), "dataset": _generation(config.data.path)}
        found["free GiB"] = free_gib(config)
    found["clock"] = time.time()
    return found


def doubts(everybodys: Sequence[Mapping[str, Any]]) -> list[str]:
    """What may differ, and is worth a word."""
    said = []
    for what, consequence in WORTH_A_WORD.items():
        values = [one.get(what) for one in everybodys]
        if any(value != values[0] for value in values):
            said.append(difference(what, values, everybodys, consequence))
    clocks = [one["clock"] - everybodys[0]["clock"] for one in everybodys]
    rank = max(range(len(clocks)), key=lambda rank: abs(clocks[rank]))
    if abs(clocks[rank]) > CLOCK_SECONDS:
        said.append(
            f"the clock of rank {rank} on {everybodys[rank]['host']} is {clocks[rank]:+.1f} s from that of rank 0 on "
            f"{everybodys[0]['host']}: times in logs can't be compared, let NTP set it"
        )
    room = {rank: one["free GiB"] for rank, one in enumerate(everybodys) if one.get("free GiB") is not None}
    if room and room[least := min(room, key=lambda rank: room[rank])] < LEAST_FREE_GIB:
        said.append(
            f"run.dir has {room[least]:.2f} GiB left on {everybodys[least]['host']}: make room, or no checkpoint fits"
        )
    return said


def difference(what: str, values: Sequence[Any], everybodys: Sequence[Mapping[str, Any]], remedy: str) -> str:
    """``torch is 2.12.0 on rank 1 (node-b) and 2.13.0 on rank 0, 2, 3 (node-a): ...``, the fewer first."""
    counts = Counter(map(str, values))
    usual = max(counts, key=lambda value: (counts[value], value == str(values[0])))
    odd = next(str(value) for value in values if str(value) != usual)

    def ranks(of: str) -> str:
        found = [rank for rank, value in enumerate(values) if str(value) == of]
        hosts = list(dict.fromkeys(everybodys[rank]["host"] for rank in found))
        more = f" and {len(found) - LISTED} more" if found[LISTED:] else ""
        where = ", ".join(hosts[:2]) + (", ..." if hosts[2:] else "")
        said = "missing" if of == "None" else of
        return f"{said} on rank {', '.join(map(str, found[:LISTED]))}{more} ({where})"

    return f"{what} is {ranks(odd)} and {ranks(usual)}: {remedy}"


@cache
def code_digest() -> str:
    """Of all of gr's own files, as Python reads them."""
    digest = hashlib.blake2b(digest_size=6)
    package = Path(gr.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def digest_of(config: RunConfig) -> str:
    """12 hexadecimal digits, by which processes and heartbeats tell that they have the same config."""
    text = json.dumps(configs.to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _generation(path: str) -> str | None:
    """What a dataset's manifest calls it; None where it can't be read, which is said where it is opened."""
    try:
        return json.loads(Folder(path).read(MANIFEST))["generation"]
    except Exception:
        return None


def free_gib(config: RunConfig) -> float | None:
    """Of the disk on which the run will be; None in a store."""
    folder = nearest_folder(config)
    try:
        found = os.statvfs(folder) if folder is not None else None
    except OSError:
        return None
    return None if found is None else found.f_bavail * found.f_frsize / 2**30


def nearest_folder(config: RunConfig) -> Path | None:
    """The folder in which the run's will be made, as far as there is one; None in a store."""
    where = config.run.dir or "runs"
    if is_url(where):
        return None
    return next(path for path in (Path(where), *Path(where).absolute().parents) if path.is_dir())


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
