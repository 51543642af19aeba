"""Memory of a step: its peak beside its inputs, and what is kept between the passes."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import operators
from benchmarks.kernels.problem import Case, Step, gradients
from gr.train.memory import give_back_freed_memory


def kept_bytes(step: Step, case: Case) -> int:
    """Bytes of the tensors that autograd keeps from the forward to the backward pass, the case's inputs and the
    step's leaves left out; a storage kept twice counts once."""
    known = {_storage(x) for x in [*case.inputs(), *step.leaves.values()]}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if _storage(x) not in known:
            kept[_storage(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = step.forward()
    del out
    return sum(kept.values())


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def peak_on_gpu(step: Step, upstream: Tensor) -> int:
    """Bytes allocated at the peak of a step beyond those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(step, upstream)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(operator: str, spec: Any, way: str, threads: int) -> float:
    """Bytes by which one step of a listed way raises the peak resident memory of a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_in_child, args=(operator, spec, way, threads, sender))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {way!r} on {spec.name} died") from None
    finally:
        process.join()


def _peak_in_child(operator_name: str, spec: Any, way_name: str, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    operator = operators.load(operator_name)

    def step_of(spec: Any) -> tuple[Step, Tensor]:
        case = operator.build(spec, torch.device("cpu"))
        way = next(way for way in operator.ways(case) if way.name == way_name)
        return way.bind(case), case.upstream

    gradients(*step_of(spec.small()))  # loading code and starting threads is not the step's memory
    step, upstream = step_of(spec)
    give_back_freed_memory()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the peak so far is forgotten: the warm-up's may be as high
    before = peak_resident_bytes()
    gradients(step, upstream)
    answer.send(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """Of this process. (On Linux ru_maxrss starts from the parent's at the fork: not that.)"""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(device: torch.device) -> float:
    """Memory that is free now; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if sys.platform == "linux":
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return float("inf")
