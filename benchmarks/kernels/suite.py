"""The whole report of the kernels on this machine: tests, sanitizer, resources and every benchmark, into one folder.

    python benchmarks/kernels/suite.py --device cuda [--steps tests hstu_attention ...]

Steps that are named alone are redone and the rest of the folder stays, so that a report can be made in pieces; with
"!tests-every-combination" all are but that one, the last and by far the longest. Ends with 0 when every step passed,
1 when one failed, 2 when the machine can't do it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.kernels import markdown, operators, sanitizer  # noqa: E402
from benchmarks.kernels.arguments import positive  # noqa: E402
from benchmarks.training.cases import ENGINES, TABLES  # noqa: E402
from gr.errors import UserError, nearest, program  # noqa: E402
from gr.train import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PYTHON = "python"
RUN = ("benchmarks/kernels/run.py",)
TRAINING = ("benchmarks/training/scaling.py",)
NO_TESTS = 5  # how pytest ends then
EVERY_COMBINATION = "tests/kernels/test_hstu_attention_triton.py::test_every_combination"
# Those that are no step of their own.
OTHER_SLOW_TESTS = "not test_every_combination and not test_kernels_compile_within_their_resources"
SECONDS = {"cuda": 2.0, "cpu": 20.0}  # of timing a shape


@dataclass(frozen=True)
class Step:
    """command: after the interpreter, or a program's name first.  environment: variables beside ours."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the GPU report needs an NVIDIA GPU that torch sees (an H200 for the figures to be reached): there is none"
        )
    folder = options.out.resolve() if options.out else RESULTS / name_of(options.device)
    steps = plan(options.device, folder, options.seconds or SECONDS[options.device])
    steps = chosen(steps, options.steps or ())
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "steps.json"
    done: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    for number, step in enumerate(steps):
        print(f"[{number + 1}/{len(steps)}] {step.name}: {' '.join(step.command)}", flush=True)
        done[step.name] = carry_out(step, folder)
        record.write_text(json.dumps(done, indent=1) + "\n")
        print(f"  {done[step.name]['status']}, {done[step.name]['seconds']:.0f} s", flush=True)
        markdown.write(folder, options.device, done)
    print(f"report: {folder / markdown.REPORT}")
    return 1 if any(done[step.name]["status"].startswith("failed") for step in steps) else 0


def chosen(steps: list[Step], asked: Sequence[str]) -> list[Step]:
    """The steps of these names, or all but those of names with an exclamation mark; all when none is named."""
    names = [step.name for step in steps]
    for name in asked:
        if name.removeprefix("!") not in names:
            raise UserError(f"--steps {name}: no such step; {nearest(name.removeprefix('!'), names)}")
    wanted = [name for name in asked if not name.startswith("!")] or names
    return [step for step in steps if step.name in wanted and f"!{step.name}" not in asked]


def name_of(device: str) -> str:
    """gpu-nvidia-h200, cpu-amd-epyc: what the figures belong to."""
    model = torch.cuda.get_device_name() if device == "cuda" else environment.cpu_model()
    words = re.findall(r"[a-z0-9]+", (model or "unknown").lower())
    return f"{'gpu' if device == 'cuda' else 'cpu'}-{'-'.join(words[:4])}"


def plan(device: str, folder: Path, seconds: float) -> list[Step]:
    """Every step, in order. Their commands, which results keep, have no path of this machine where that can be."""
    out = str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)

    def benchmark(operator: str, part: str = "", *more: str) -> Step:
        label = f"{operator}-{part}" if part else operator
        options = ("--device", device, "--seconds", f"{seconds:g}", "--out", out, "--label", label)
        return Step(label, (PYTHON, *RUN, operator, *options, *more))

    if device == "cpu":
        return [benchmark(name) for name in operators.NAMES]
    compiled = ("full-n4096-d64-h4-*", "full-n4096-d128-h4-*-none-*", "ml-1m-n200-d64-*")
    return [
        _tests("tests", "-m", "not slow", "tests/kernels"),
        _tests("tests-gpu", "-m", "gpu and not slow", "tests", "--ignore=tests/kernels"),
        *(Step(name, command, sanitizer.ENVIRONMENT) for name, command in sanitizer.steps(PYTHON, RUN, out)),
        Step("resources", (PYTHON, "benchmarks/kernels/resources.py", "--all")),
        _tests("tests-slow", "-m", "slow", "-k", OTHER_SLOW_TESTS, "tests"),
        benchmark("hstu_attention", "", "--shapes", "full-*-none-*"),
        benchmark("hstu_attention", "bias", "--shapes", "full-n1024-d64-h4-*", "full-n4096-d64-h4-*"),
        benchmark("hstu_attention", "jagged", "--shapes", "ml-1m-*", "uniform-*"),
        benchmark("block", "", "--against", "eager", "compiled"),
        *(benchmark(name) for name in operators.NAMES if name not in ("hstu_attention", "block")),
        benchmark(
            "hstu_attention", "compiled", "--shapes", *compiled, "--against", "flex", "compiled", "sdpa-flash"
        ),
        _training(out, seconds),
        _tests("tests-every-combination", *_in_parallel(), EVERY_COMBINATION),
    ]


def _training(out: str, seconds: float) -> Step:
    """Steps shared out to 1, 2, 4 ... GPUs, as far as there are some; what isn't installed is left out."""
    tables = TABLES if importlib.util.find_spec("torchrec") else {"local": ""}
    engines = [name for name in ENGINES if "zero" not in name or importlib.util.find_spec("deepspeed")]
    options = ("--device", "cuda", "--seconds", f"{10 * seconds:g}", "--json", f"{out}/training.json")
    half = ("--set", "train.precision=bf16")
    return Step("training", (PYTHON, *TRAINING, *options, "--tables", *tables, "--engines", *engines, *half))


def _tests(name: str, *arguments: str) -> Step:
    return Step(name, (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments))


def _in_parallel() -> tuple[str, ...]:
    """pytest's options to use every core, where pytest-xdist is installed: the work is the compiler's.  All of it is
    one test's cases, in one file, which ``--dist loadfile`` (of ``make test``) would give to one process."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(os.cpu_count() or 1), "--dist", "worksteal")


def carry_out(step: Step, folder: Path) -> dict[str, Any]:
    """Runs a step, its output in FOLDER/STEP.log; "not run: why" where its program isn't there."""
    command = [sys.executable if word == PYTHON else word for word in step.command]
    found = {"command": shlex.join(step.command), "seconds": 0.0}
    if shutil.which(command[0]) is None:
        return {**found, "status": f"not run: there is no {command[0]} on this machine"}
    log = folder / f"{step.name}.log"
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = time.perf_counter()
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=variables | dict(step.environment)
        ).returncode
    status = "passed" if code == 0 else f"failed ({code}): {log.name}"
    if code == NO_TESTS and "pytest" in command:
        status = "no tests"
    return {**found, "seconds": time.perf_counter() - started, "status": status}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument(
        "--steps", nargs="+", metavar="STEP", help="only these, by the names that a run prints"
    )
    parser.add_argument(
        "--seconds", type=positive(float), help="of timing a shape (default 2 on a GPU, 20 on a CPU)"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME or cpu-NAME")
    return parser


if __name__ == "__main__":
    sys.exit(main())
