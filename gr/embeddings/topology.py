"""What a planner knows of a cluster: memory and bandwidths of GPUs by name, or of the machine that it runs on.

The figures are public ones of NVIDIA's DGX machines, eight GPUs each.  A planner compares ways with them and adds up
memory; nothing is tuned by them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from gr.errors import UserError
from gr.processes import Processes

GB, GIB = 10**9, 2**30
HOST_SPEED = 200 * GB  # a CPU reads its memory: eight channels of DDR4 and more
KEPT_BACK = 0.15  # of every memory: for the dense part, activations and what is exchanged


@dataclass(frozen=True)
class Hardware:
    """memory: bytes of a device.  Bandwidths in bytes a second, one way: ``speed`` of that memory, ``link`` to the
    devices of the same machine, ``network`` a device's share of the way to other machines, ``host_link`` to the
    machine's memory."""

    memory: int
    speed: float
    link: float
    network: float
    host_link: float
    per_machine: int = 8


GPUS = {
    # "NVIDIA A100 Tensor Core GPU" data sheet, SXM 80 GB: 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4.0 x16;
    # DGX A100 data sheet: a 200 Gb/s InfiniBand adapter a GPU
    "a100": Hardware(80 * GB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB),
    # "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe 5.0 x16;
    # DGX H100 data sheet: a 400 Gb/s adapter a GPU
    "h100": Hardware(80 * GB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB),
    # "NVIDIA H200 Tensor Core GPU" data sheet: 141 GB, 4.8 TB/s; the rest as the H100's
    "h200": Hardware(141 * GB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB),
    # "NVIDIA DGX B200" data sheet: 1,440 GB and 64 TB/s of eight GPUs, NVLink 14.4 TB/s of eight both ways, a
    # 400 Gb/s adapter a GPU; PCIe 5.0 x16
    "b200": Hardware(180 * GB, 8000 * GB, 900 * GB, 50 * GB, 64 * GB),
}
NAMES = ("auto", *GPUS)


@dataclass(frozen=True)
class Cluster:
    """``processes`` on machines of ``per_machine``, each with a device of ``hardware``.  host_memory: bytes of a
    machine.  device: cpu or cuda."""

    processes: int
    per_machine: int
    device: str
    hardware: Hardware
    host_memory: int

    @property
    def room(self) -> int:
        """Bytes of the device's own memory that a process may fill with tables: on a CPU its share of the machine's."""
        return self.host_room if self.device == "cpu" else int(self.hardware.memory * (1 - KEPT_BACK))

    @property
    def host_room(self) -> int:
        """The same of the machine's memory."""
        return int(self.host_memory / self.per_machine * (1 - KEPT_BACK))

    def of(self, processes: int) -> Cluster:
        """As many machines of this kind as so many processes need."""
        per_machine = min(processes, self.full_machine)
        return Cluster(processes, per_machine, self.device, self.hardware, self.host_memory)

    @property
    def full_machine(self) -> int:
        """Processes of a machine that has as many as it can: more than it has go to another one."""
        return self.per_machine if self.device == "cpu" else max(self.per_machine, self.hardware.per_machine)


def cluster(topology: str, processes: Processes) -> Cluster:
    """What the processes of this run are on: ``topology`` names its GPUs, or is ``auto``; on CPUs it says nothing.

    Raises UserError for GPUs that aren't known by name.
    """
    world, local = processes.world.size, max(processes.local.size, 1)
    if processes.device.type == "cpu":
        return Cluster(world, local, "cpu", _cpu(), host_memory())
    properties = torch.cuda.get_device_properties(processes.device)
    known = GPUS[topology if topology != "auto" else named(properties.name)]
    found = Hardware(properties.total_memory, known.speed, known.link, known.network, known.host_link)
    return Cluster(world, local, "cuda", found, host_memory())


def imagined(topology: str, processes: int, local: int = 1) -> Cluster:
    """A cluster of so many processes: of the GPUs that ``topology`` names, eight a machine with 2 TB; else of CPUs like
    this machine, ``local`` processes on each."""
    if topology == "auto":
        return Cluster(processes, min(processes, local), "cpu", _cpu(), host_memory())
    hardware = GPUS[topology]
    return Cluster(processes, min(processes, hardware.per_machine), "cuda", hardware, 2000 * GB)


def named(gpu: str) -> str:
    """The name in :data:`GPUS` of a GPU as its driver calls it (``NVIDIA H100 80GB HBM3``)."""
    words = gpu.lower().replace("-", " ").split()
    found = next((name for name in GPUS if name in words), None)
    if found is None:
        raise UserError(
            f"nothing is known of the bandwidths of a '{gpu}', with which tables are planned: name the nearest of "
            f"{', '.join(GPUS)} as model.table.topology",
            everywhere=True,
        )
    return found


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu() -> Hardware:
    """A CPU's link is its memory; a network of 100 Gb/s."""
    return Hardware(host_memory(), HOST_SPEED, HOST_SPEED / 4, 12.5 * GB, HOST_SPEED, 1)
