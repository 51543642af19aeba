"""The numeric tests under the instruction sets and library settings that other processors have.

    python tests/instruction_sets.py [--only NAME ...] [-- PYTEST ARGUMENTS]

Each setting is an environment of a pytest process of its own; the exit status is 1 if any of them has a failure. One
that asks ATen for what the processor lacks is left out, and said; MKL and oneDNN take what there is. What Triton's
interpreter computes, in NumPy, is left out; with `-- -k ""` it is not. `-- --deselect=tests/distributed` leaves out
those over several processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "aten-avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "mkl-avx512": {"MKL_CBWR": "AVX512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "all-avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "threads-2": {"GR_TEST_THREADS": "2"},
    "threads-4": {"GR_TEST_THREADS": "4"},
}
NEEDS = {"aten-avx2": "avx2", "aten-avx512": "avx512f", "all-avx2": "avx2"}
"""Flags of the processor without which ATen's kernels are illegal instructions."""
TESTS = [
    "tests/kernels",
    *(
        f"tests/unit/test_{name}.py"
        for name in ("precision", "table", "objectives", "optimizers_schedule", "paired")
    ),
    *(f"tests/unit/test_models_{name}.py" for name in ("dropout", "encoders", "hstu", "hstu_fused", "input")),
    *(f"tests/unit/test_models_{name}.py" for name in ("ranking", "retrieval")),
    *(f"tests/unit/test_{name}.py" for name in ("padded_baseline", "baselines", "pointwise", "views")),
    *(f"tests/unit/test_eval_{name}.py" for name in ("ranking", "recommend")),
    "tests/end_to_end/test_golden_losses.py",
    "tests/distributed",
]
# What doesn't compute, or always computes alike: benchmarks, packaging, sources, resources of GPU kernels.
LEFT_OUT = ["test_benchmark", "test_packaging", "test_cuda_sources", "test_resources", "test_available"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("pytest", nargs="*", help="more arguments of pytest, after --")
    arguments = parser.parse_args()
    failed = []
    flags = Path("/proc/cpuinfo").read_text().split()
    for name in arguments.only:
        if NEEDS.get(name, "") not in ["", *flags]:
            print(f"{name:16} left out: the processor has no {NEEDS[name]}", flush=True)
            continue
        begun = time.monotonic()
        ignored = [f"--ignore=tests/kernels/{file}.py" for file in LEFT_OUT]
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton"]
        command = [*pytest, *TESTS, *ignored, *arguments.pytest]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | SETTINGS[name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = done.stdout.splitlines()
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                print(f"    {line}")
        words = " ".join(f"{key}={value}" for key, value in SETTINGS[name].items()) or "as it comes"
        last = lines[-1] if lines else "no output"
        last = f"ended by signal {-done.returncode}" if done.returncode < 0 else last
        print(f"{name:16} {words}: {last.strip('= ')} ({time.monotonic() - begun:.0f} s)", flush=True)
        if done.returncode:
            failed.append(name)
    print(f"failed under {', '.join(failed)}" if failed else "the same under all of them")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
