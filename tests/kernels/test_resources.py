"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and needs no more than is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.kernels.resources import (
    NO_COMPILER,
    SHARED_MEMORY,
    Job,
    Resources,
    gates,
    regressions,
    unchanged,
)

GOOD = Resources(registers=100, spills=0, shared=100_000, wgmma=4, mma_sync=0)


def job(**changes: object) -> Job:
    settings = {
        "folder": "f",
        "index": 0,
        "architecture": 90,
        "key": "f.case.sm_90",
        "hot": True,
        "spill_budget": 0,
    }
    return Job(**settings | changes)  # type: ignore[arg-type]


def test_gates() -> None:
    assert not gates(job(), GOOD)
    assert "spills 8 B" in gates(job(), replace(GOOD, spills=8))[0]
    assert not gates(job(spill_budget=8), replace(GOOD, spills=8))
    assert "2 mma.sync" in gates(job(), replace(GOOD, mma_sync=2))[0]
    assert "0 wgmma" in gates(job(), replace(GOOD, wgmma=0))[0]
    assert not gates(job(hot=False), replace(GOOD, wgmma=0, mma_sync=2))
    assert not gates(job(architecture=80), replace(GOOD, wgmma=0, mma_sync=2))
    for architecture, limit in SHARED_MEMORY.items():
        wide = replace(GOOD, shared=limit + 1)
        assert "shared memory" in gates(job(architecture=architecture), wide)[0]


def test_regressions() -> None:
    record = {"triton": "1", "cases": {"f.case.sm_90": asdict(GOOD)}}
    assert not regressions(job(), replace(GOOD, registers=110), record, "1")
    assert regressions(job(), replace(GOOD, registers=111), record, "1") == ["registers 100 -> 111"]
    assert regressions(job(), replace(GOOD, shared=120_000), record, "1") == ["shared 100,000 -> 120,000"]
    assert not regressions(job(), replace(GOOD, registers=200), record, "another version")
    assert "wgmma" in regressions(job(), replace(GOOD, wgmma=0), record, "another version")[0]
    assert "not in the record" in regressions(job(key="new"), GOOD, record, "1")[0]


def test_only_what_was_recorded_under_its_key_is_taken_from_the_record() -> None:
    record = {"triton": "1", "cases": {"f.case.sm_90": asdict(GOOD) | {"compiled": "abc"}}}
    assert unchanged([job()], ["abc"], record) == {"f.case.sm_90": GOOD}
    assert not unchanged([job()], ["abd"], record)
    assert not unchanged([job(key="new")], ["abc"], record)
    assert not unchanged([job()], ["abc"], {"triton": "1", "cases": {"f.case.sm_90": asdict(GOOD)}})


KEYS = """
import sys
from dataclasses import replace
from benchmarks.kernels.resources import cases, key_of

case = cases("bias_table_gradient")[0]
name, value = next((n, v) for n, v in case.constexprs.items() if isinstance(v, int) and v > 1)
others = [
    replace(case, constexprs={**case.constexprs, name: 2 * value}),
    replace(case, num_warps=2 * case.num_warps),
    replace(case, unaligned=tuple(n for n, kind in case.signature.items() if kind.startswith("*"))),
]
print(*[key_of(case, 80), key_of(case, 90), *(key_of(other, 90) for other in others)])
"""


def test_whatever_changes_a_kernel_changes_its_key(checkout: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", KEYS]
    done = [
        subprocess.run(program, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    keys = done[0].stdout.split()
    assert len(set(keys)) == 5
    assert done[1].stdout.split() == keys


@pytest.mark.slow
def test_kernels_compile_within_their_resources(checkout: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = checkout / "benchmarks" / "kernels" / "resources.py"
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode == NO_COMPILER:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
