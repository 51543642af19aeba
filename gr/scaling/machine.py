"""What plans on paper know of a machine: how fast it computes, reads its memory, and talks to others.

What a data sheet says is a ceiling; the shares below are what is counted on of it.  They are stated, not measured here:
no GPU has run this project's training yet.  Any figure can be given otherwise (``changed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from gr.embeddings.topology import GB, GIB, GPUS, Cluster, Hardware, cluster, host_memory, named
from gr.errors import UserError, nearest
from gr.processes import Processes

TERA = 1e12
PEAKS = {
    # dense (not sparse) products of bfloat16 on tensor cores, and of float32 on the others, a second; NVIDIA's data
    # sheets of the A100 (SXM, 80 GB), H100 (SXM) and H200, and of the DGX B200 (eight GPUs: 36 PFLOP/s bf16 dense)
    "a100": (312 * TERA, 19.5 * TERA),
    "h100": (989.5 * TERA, 67 * TERA),
    "h200": (989.5 * TERA, 67 * TERA),
    "b200": (2250 * TERA, 75 * TERA),
}


CPU_PRODUCTS, CPU_SPEED = 0.1 * TERA, 10.0 * GB
"""Of a core: until they are measured (gr/scaling/calibration.py)."""

SHARES = ("products", "attention", "moved", "exchanged")


@dataclass(frozen=True)
class Machine:
    """A device, and its way to others.

    memory: bytes.  bf16, fp32: the ceiling of products, operations a second.  speed, link, network: bytes a second, of
    its memory, to the devices of the same machine, and to other machines.  per_machine: devices.  host_memory: bytes of
    a machine.  products, attention, moved, exchanged: what is counted on of the ceilings, as shares: by matrix
    products, by attention, of the memory's speed, and of links and network.  call: seconds that starting an
    operation takes; on a GPU while the one before runs.  collective: that an exchange takes beside its bytes.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    speed: float
    link: float
    network: float
    per_machine: int = 8
    host_memory: float = 2000.0 * GB
    products: float = 0.7
    attention: float = 0.4
    moved: float = 0.8
    exchanged: float = 0.8
    call: float = 5e-6
    collective: float = 3e-5
    device: str = "cuda"

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of products of this type."""
        return self.bf16 if dtype in (torch.bfloat16, torch.float16) else self.fp32

    def changed(self, settings: Sequence[str]) -> Machine:
        """With other figures: ``speed=3.9e12``, ``attention=0.5``."""
        known = {field.name for field in fields(self)} - {"name", "device"}
        values: dict[str, float] = {}
        for setting in settings:
            key, _, text = setting.partition("=")
            if key not in known:
                raise UserError(f"a machine has no '{key}': {nearest(key, sorted(known))}")
            try:
                values[key] = float(text)
            except ValueError:
                raise UserError(f"--machine {setting}: {key} is a number, as in {key}=0.5") from None
            if not 0 < values[key] < float("inf"):
                raise UserError(f"--machine {setting}: {key} must be above 0")
            if key in SHARES and values[key] > 1:
                raise UserError(f"--machine {setting}: {key} is a share of a ceiling, 1 at most")
        if (count := values.get("per_machine", 1)) != int(count):
            raise UserError(f"--machine per_machine={count:g}: a machine has a whole number of devices")
        if "per_machine" in values:
            values["per_machine"] = int(count)
        return replace(self, **values)  # type: ignore[arg-type]

    def cluster(self, processes: int) -> Cluster:
        """So many devices, and as many machines as they need."""
        hardware = Hardware(
            int(self.memory),
            self.speed,
            self.link,
            self.network,
            self.link,
            self.per_machine,  # type: ignore[arg-type]
        )
        local = min(processes, self.per_machine)
        return Cluster(processes, local, self.device, hardware, int(self.host_memory))

    def seconds_together(self, sent: float, processes: int, *, all_to_all: bool) -> float:
        """For a collective in which each process sends so many bytes.  Within a machine its link bounds it.  Between
        machines a ring (all-reduce, all-gather, reduce-scatter) runs through all network adapters of a machine at once;
        all-to-all sends what is for other machines through a process's own."""
        if processes <= 1 or not sent:
            return 0.0
        inside = sent / (self.link * self.exchanged)
        if processes <= self.per_machine:
            return self.collective + inside
        if not all_to_all:
            return self.collective + sent / (min(self.link, self.network * self.per_machine) * self.exchanged)
        away = (processes - self.per_machine) / (processes - 1)
        outside = sent * away / (self.network * self.exchanged)
        return self.collective + max(inside * (1 - away), outside)


def here(processes: Processes) -> Machine:
    """What the processes of a run are on: GPUs that are known by name, or CPUs with round figures."""
    on = cluster("auto", processes)
    if on.device == "cuda":
        name = named(torch.cuda.get_device_name(processes.device))
        return gpu(
            name, torch.cuda.get_device_properties(processes.device).total_memory / GIB, on.per_machine
        )
    return cpu(on.per_machine)


def cpu(per_machine: int) -> Machine:
    """A machine like this one, shared by so many processes; its speeds are round figures of a core or two."""
    return Machine(
        "cpu",
        memory=host_memory() / per_machine,
        bf16=CPU_PRODUCTS,
        fp32=CPU_PRODUCTS,
        speed=CPU_SPEED,
        link=CPU_SPEED / 4,
        network=12.5 * GB,
        per_machine=per_machine,
        host_memory=host_memory(),
        call=2e-5,
        device="cpu",
    )


def gpu(name: str, hbm_gib: float | None = None, per_machine: int | None = None) -> Machine:
    """A GPU by name, as its data sheet has it, perhaps with another memory or another number in a machine."""
    if name not in GPUS:
        raise UserError(f"nothing is known of a GPU '{name}': {nearest(name, GPUS)}")
    known, (bf16, fp32) = GPUS[name], PEAKS[name]
    return Machine(
        name,
        known.memory if hbm_gib is None else hbm_gib * GIB,
        bf16,
        fp32,
        known.speed,
        known.link,
        known.network,
        known.per_machine if per_machine is None else per_machine,
    )
