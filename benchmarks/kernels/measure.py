"""Measures the ways of one case: what stands in their way, the correctness gate, memory, and times in turns."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import gates, memory, timing
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.problem import PASSES, Case, Operator, Result, Step, Way, WithExtra

REFUSAL = "can't run here: "  # gr_kernels.dispatch.choose


@dataclass(frozen=True)
class Settings:
    """seconds: of timing a case; rounds: instead, that many of each way; threads: of the processes that measure
    memory on a CPU."""

    seconds: float = 20.0
    rounds: int | None = None
    memory: bool = True
    threads: int = 1


def measure_case(
    operator: Operator, case: Case, ways: list[Way], ceilings: Ceilings, settings: Settings
) -> dict[str, Any]:
    """JSON-able: the case, and for every way its figures or the reason why there are none."""
    results: dict[str, Result] = {}
    steps: dict[str, Step] = {}
    gate_of: dict[str, gates.Gate] = {}
    for way in ways:
        result = results[way.name] = Result(way.name, way.ours, note=way.note)
        step = _checked(operator, case, way, gate_of, settings, result)
        if step is not None:
            steps[way.name] = step
    gate_of.clear()
    _free(case.device)
    times = timing.take_turns(steps, case.upstream, settings.seconds, settings.rounds)
    if settings.memory and case.device.type == "cpu":
        listed = {way.name for way in operator.ways(case)}
        for name in steps:
            if name in listed and name != "compiled":  # (compiling takes memory of its own)
                results[name].peak_bytes = memory.peak_on_cpu(
                    operator.NAME, case.spec, name, settings.threads
                )
    return {
        **case.describe(),
        "flops": {which: case.work.flops(which) for which in PASSES},
        "bytes": {which: case.work.bytes(which) for which in PASSES},
        "ways": [_figures(result, times, case, ceilings) for result in results.values()],
    }


def _checked(
    operator: Operator,
    case: Case,
    way: Way,
    gate_of: dict[str, gates.Gate],
    settings: Settings,
    result: Result,
) -> Step | None:
    """The way's step, when it runs and its results are right; else ``result`` says why not."""
    try:
        result.why = way.obstacle(case)
        if result.why:
            return None
        if way.answer:
            judged = case.for_gate or case
            if way.answer not in gate_of:
                gate_of[way.answer] = gates.build(operator, judged, way.answer)
            result.errors, wrong = gate_of[way.answer].judge(way.bind(judged), judged, way)
            if wrong:
                result.red, result.why = True, f"WRONG: {wrong}"
                return None
        step = way.bind(case)
        result.kept_bytes = memory.kept_bytes(step, case)
        if settings.memory and case.device.type == "cuda":
            result.peak_bytes = memory.peak_on_gpu(step, case.upstream)
        if isinstance(operator, WithExtra):
            result.extra = operator.extra(step, case)
        return step
    except (torch.OutOfMemoryError, MemoryError):
        result.why = "out of memory"
    except Exception as error:  # Triton's errors are no RuntimeErrors, and a peer may fail in any way
        refusal = str(error).partition(REFUSAL)[2]
        # A peer may refuse a shape in ways of its own; ours say that they do.
        result.red = way.ours and not refusal
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        result.why = refusal.rstrip(".") or f"failed: {type(error).__name__}: {first_line}"
    _free(case.device)
    return None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _figures(
    result: Result, times: dict[str, timing.Times], case: Case, ceilings: Ceilings
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "way": result.way,
        "ours": result.ours,
        "why": result.why,
        "red": result.red,
        "note": result.note,
        "relative_errors": result.errors,
        "peak_bytes": result.peak_bytes,
        "kept_bytes": result.kept_bytes,
        **result.extra,
        "kept_bytes_per_token": None if result.kept_bytes is None else result.kept_bytes / case.tokens,
    }
    if result.way not in times:
        return found
    own = times[result.way]
    for which in case.passes:
        p10, p50, p90 = timing.p10_p50_p90(own.of(which))
        flops, moved = case.work.flops(which) / p50 * 1e3, case.work.bytes(which) / p50 * 1e3
        found[which] = {
            "rounds": len(own.forward),
            "ms_p10": p10,
            "ms_p50": p50,
            "ms_p90": p90,
            "tflops": flops / 1e12,
            "gb_per_s": moved / 1e9,
            "of_matmul": flops / ceilings.flops[case.spec.dtype],
            "of_copy": moved / ceilings.bytes,
            # how many times as fast as each of the others
            "speedup_over": {
                other: timing.ratio(taken, own, which)
                for other, taken in times.items()
                if other != result.way
            },
        }
    if case.device.type == "cpu":
        found["cpu_ms_p50"] = float(np.median(own.cpu))
    return found
