"""What the operators must reach, and whether a folder of results shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Runs = dict[str, dict[str, Any]]  # label -> the JSON of a run
MEASURED_ON = "H200"
TENSOR = ("cuda", "triton")
DETERMINISTIC = ("cuda-deterministic", "triton-deterministic")
HOST = "a CPU"


@dataclass(frozen=True)
class Requirement:
    """find: gives (what was measured, reached or not) for every figure the runs have of it."""

    text: str
    on: str
    find: Callable[[Runs], Iterator[tuple[str, bool]]]


@dataclass(frozen=True)
class Verdict:
    text: str
    on: str
    status: str  # "reached", "missed" or "not measured"
    measured: list[str]


def judge(runs: Runs, device: str) -> list[Verdict]:
    """Every requirement; those of the other kind of device are never measured here."""
    verdicts = []
    for requirement in REQUIREMENTS:
        found = list(requirement.find(runs)) if (requirement.on == HOST) == (device == "cpu") else []
        status = "not measured" if not found else "reached" if all(ok for _, ok in found) else "missed"
        measured = [f"{text}{'' if ok else ' (missed)'}" for text, ok in found]
        verdicts.append(Verdict(requirement.text, requirement.on, status, measured))
    return verdicts


def runs_of(runs: Runs, operator: str) -> list[Runs]:
    """Each run of an operator alone."""
    return [{label: run} for label, run in runs.items() if run["operator"] == operator]


def cases(runs: Runs, operator: str, **wanted: Any) -> Iterator[dict[str, Any]]:
    for run in runs.values():
        for case in run["cases"] if run["operator"] == operator else ():
            if all(case.get(name) == value for name, value in wanted.items()):
                yield case


def way(case: dict[str, Any], *names: str) -> dict[str, Any] | None:
    """The first of these ways that was timed."""
    timed = {each["way"]: each for each in case["ways"] if "both" in each}
    return next((timed[name] for name in names if name in timed), None)


def rate(which: str, least: float, width: int, *names: str) -> Callable[[Runs], Iterator[tuple[str, bool]]]:
    """TFLOP/s of full causal attention without bias, four heads, N >= 4096."""

    def find(runs: Runs) -> Iterator[tuple[str, bool]]:
        for case in cases(
            runs, "hstu_attention", lengths="full", bias="none", H=4, D=width, dtype="bfloat16"
        ):
            found = way(case, *names)
            if case["N"] >= 4096 and found:
                tflops = found[which]["tflops"]
                yield f"N={case['N']}: {tflops:.0f} ({found['way']})", tflops >= least

    return find


def widest_works(runs: Runs) -> Iterator[tuple[str, bool]]:
    for case in cases(runs, "hstu_attention", D=256, H=4, dtype="bfloat16"):
        if found := way(case, *TENSOR):
            rates = " / ".join(f"{found[which]['tflops']:.0f}" for which in ("forward", "backward"))
            yield f"N={case['N']}: right, {rates} TFLOP/s forward / backward", True


def bias_cost(bias: str, which: str, most: float) -> Callable[[Runs], Iterator[tuple[str, bool]]]:
    """Time with a bias over time without, D = 64."""

    def find(runs: Runs) -> Iterator[tuple[str, bool]]:
        shape = {"lengths": "full", "H": 4, "D": 64, "dtype": "bfloat16"}
        for run in runs_of(runs, "hstu_attention"):  # times of one process alone are compared
            for case in cases(run, "hstu_attention", bias=bias, **shape):
                for bare in cases(run, "hstu_attention", bias="none", N=case["N"], **shape):
                    a, b = way(case, *TENSOR), way(bare, *TENSOR)
                    if a and b:
                        ratio = a[which]["ms_p50"] / b[which]["ms_p50"]
                        yield f"N={case['N']}: {ratio:.2f}x", ratio <= most

    return find


def faster(
    operator: str, ours: tuple[str, ...], other: str, least: float, which: str = "both", **wanted: Any
) -> Callable[[Runs], Iterator[tuple[str, bool]]]:
    def find(runs: Runs) -> Iterator[tuple[str, bool]]:
        for case in cases(runs, operator, **wanted):
            found = way(case, *ours)
            if found and other in found[which]["speedup_over"]:
                speedup = found[which]["speedup_over"][other]
                yield f"{case['name']}: {speedup:.2f}x", speedup >= least

    return find


def elementwise_share(runs: Runs) -> Iterator[tuple[str, bool]]:
    for case in cases(runs, "block"):
        if (found := way(case, "fused")) and "shares" in found:
            share = found["shares"]["parts"]["elementwise"]
            yield f"{case['name']}: {share:.1%}", share <= 0.05


def kept(runs: Runs) -> Iterator[tuple[str, bool]]:
    """Against what gr_kernels/fused_layer/README.md states: 12 d bytes and 16 a row in bfloat16."""
    for case in cases(runs, "block", dtype="bfloat16"):
        if found := way(case, "fused"):
            stated = 12 * case["H"] * case["D"] + 16
            ratio = found["kept_bytes_per_token"] / stated
            yield f"{case['name']}: {ratio:.2f}x the stated {stated:,} bytes", abs(ratio - 1) <= 0.1


def loss_memory(runs: Runs) -> Iterator[tuple[str, bool]]:
    """Peak beside inputs and gradients, at the largest catalogue against the smallest."""
    by_size: dict[int, float] = {}
    for case in cases(runs, "cross_entropy", normalized=False, dtype="bfloat16"):
        found = way(case, "triton", "chunked")
        if found and found["peak_bytes"] is not None:
            by_size[case["I"]] = found["peak_bytes"] - 2 * (case["T"] + case["I"]) * case["D"]
    if len(by_size) >= 2:
        small, large = min(by_size), max(by_size)
        measured = (
            f"{by_size[small] / 2**20:,.0f} MiB at I={small:,}, {by_size[large] / 2**20:,.0f} at I={large:,}"
        )
        yield measured, by_size[large] <= 1.1 * by_size[small] + 32 * 2**20


def loss_floor(runs: Runs) -> Iterator[tuple[str, bool]]:
    for case in cases(runs, "cross_entropy", I=1_000_000, normalized=False):
        found = way(case, "triton", "chunked")
        if found and "products-only" in found["both"]["speedup_over"]:
            times = 1 / found["both"]["speedup_over"]["products-only"]
            yield f"{case['name']}: {times:.2f}x its products ({found['way']})", times <= 1.3


def less_memory(runs: Runs) -> Iterator[tuple[str, bool]]:
    for case in cases(runs, "hstu_attention", lengths="ml-1m", B=128, bias="position+time"):
        ours, eager = way(case, "cpp"), way(case, "eager")
        if ours and eager and None not in (ours["peak_bytes"], eager["peak_bytes"]):
            a, b = ours["peak_bytes"] / 2**20, eager["peak_bytes"] / 2**20
            yield f"{case['name']}: {a:,.0f} against {b:,.0f} MiB", a < b


ML_1M = {"lengths": "ml-1m", "dtype": "bfloat16"}
REQUIREMENTS = (
    Requirement(
        "attention forward, D=128, N >= 4096: >= 380 TFLOP/s", MEASURED_ON, rate("forward", 380, 128, *TENSOR)
    ),
    Requirement(
        "attention forward, D=64, N >= 4096: >= 350 TFLOP/s", MEASURED_ON, rate("forward", 350, 64, *TENSOR)
    ),
    *(
        Requirement(
            f"deterministic two-pass backward, D={width}, N >= 4096: >= 250 TFLOP/s",
            MEASURED_ON,
            rate("backward", 250, width, *DETERMINISTIC),
        )
        for width in (64, 128)
    ),
    Requirement("attention at D=256 works", MEASURED_ON, widest_works),
    *(
        Requirement(
            f"{bias} bias, D=64, {which}: <= {most}x no bias", MEASURED_ON, bias_cost(bias, which, most)
        )
        for bias, which, most in (
            ("position", "forward", 1.15),
            ("position", "backward", 1.15),
            ("position+time", "forward", 1.6),
            ("position+time", "backward", 2.0),
        )
    ),
    Requirement(
        "in-kernel bias faster than adding a stored one",
        MEASURED_ON,
        faster("hstu_attention", TENSOR, "sdpa-stored-bias", 1.0, bias="position+time", D=64, H=4),
    ),
    Requirement(
        "ML-1M lengths: >= 2.2x padded SDPA flash, pad and unpad counted",
        MEASURED_ON,
        faster("hstu_attention", TENSOR, "sdpa-flash", 2.2, **ML_1M),
    ),
    Requirement("fused block >= 1.15x unfused", MEASURED_ON, faster("block", ("fused",), "unfused", 1.15)),
    Requirement("fused block >= 3x eager", MEASURED_ON, faster("block", ("fused",), "eager", 3.0)),
    Requirement("fused block: elementwise work <= 5 % of the time", MEASURED_ON, elementwise_share),
    Requirement("fused block keeps the stated bytes a row, within 10 %", MEASURED_ON, kept),
    Requirement("cross-entropy: memory independent of I beside table and gradient", MEASURED_ON, loss_memory),
    Requirement("cross-entropy over 1 M items: <= 1.3x the time of its products", MEASURED_ON, loss_floor),
    Requirement(
        "attention, forward and backward, ML-1M lengths, batch 128, bias with gradients: >= 2.2x padded eager",
        HOST,
        faster("hstu_attention", ("cpp",), "eager", 2.2, lengths="ml-1m", B=128, bias="position+time"),
    ),
    Requirement("the same: less peak memory than padded eager", HOST, less_memory),
)
