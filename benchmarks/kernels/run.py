"""Times an operator of gr_kernels, forward and backward, against its peers.

python benchmarks/kernels/run.py hstu_attention --shapes 'full-*-d64-*' --against sdpa-flash eager

Prints a table a shape; writes OUT/OPERATOR.json and .png, and appends to OUT/kernels.csv; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.kernels import ceilings, operators, plots, report, shapes  # noqa: E402
from benchmarks.kernels.arguments import positive  # noqa: E402
from benchmarks.kernels.measure import Settings, measure_case  # noqa: E402
from benchmarks.kernels.problem import Operator, Way  # noqa: E402
from gr.errors import UserError, nearest, program  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "kernels"
WIDTH = 210  # of tables that go to a file
# Peers that compile for every shape take most of a run's time.
NOT_BY_DEFAULT = {"cpu": ("compiled",), "cuda": ("compiled", "flex", "blocked", "reference")}


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda asks for an NVIDIA GPU, and torch sees none: leave it out to use the CPU"
        )
    operator = load(options.operator)
    specs = select(operator.specs(device.type, options.grid), options.shapes)
    if options.list:
        print("\n".join(spec.name for spec in specs))
        return 0
    settings = Settings(options.seconds, options.rounds, options.memory, torch.get_num_threads())
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    label = options.label or operator.NAME
    result = run(
        operator, specs, device, settings, options.out, console, options.against, options.ours, label
    )
    red = [f"{w['way']} on {c['name']}" for c in result["cases"] for w in c["ways"] if w["red"] and w["ours"]]
    if red:
        console.print(f"[red]wrong or failed: {', '.join(red)}[/]")
    console.print(f"\nwritten: {options.out}/{label}.json, .png; appended to kernels.csv")
    return 1 if red else 0


def load(name: str) -> Operator:
    """The module that measures an operator; a UserError where gr_kernels hasn't the operator."""
    try:
        return operators.load(name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"'{name}' can't be measured: this gr_kernels has no such operator ({error}); reinstall it from ./kernels"
        ) from error


def run(
    operator: Operator,
    specs: list[Any],
    device: torch.device,
    settings: Settings,
    out: Path,
    console: Console,
    against: list[str] | None = None,
    ours: list[str] | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Measures and reports every spec; files (named after ``label``, the operator's name by default) are written after
    each, so that a run cut short leaves its part."""
    label = label or operator.NAME
    environment = report.record(["benchmarks/kernels/run.py", *sys.argv[1:]])
    found = ceilings.measure(device, [spec.dtype for spec in specs], 1.0 if settings.seconds > 1 else 0.25)
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "operator": operator.NAME,
        "formula": operator.FORMULA,
        "environment": environment,
        "device": device.type,
        "ceilings": found.describe(),
        "cases": [],
    }
    console.print(
        f"[bold]{operator.NAME}[/] on {environment['gpu'] or environment['cpu']}, torch {torch.__version__}"
    )
    console.print(operator.FORMULA)
    rates = ", ".join(f"{dtype} {flops / 1e12:,.3g} TFLOP/s" for dtype, flops in found.flops.items())
    console.print(
        f"ceilings here: matrix product {rates}; copy {found.bytes / 1e9:,.0f} GB/s (read + written)"
    )
    started = time.perf_counter()
    for number, spec in enumerate(specs):
        taken = time.perf_counter() - started
        left = f", about {taken / number * (len(specs) - number):,.0f} s to go" if number else ""
        console.print(f"\n[dim]{number + 1}/{len(specs)}, {taken:,.0f} s so far{left}[/]")
        case = operator.build(spec, device)
        ways = choose(operator.ways(case), against, ours, device)
        result["cases"].append(measure_case(operator, case, ways, found, settings))
        del case
        console.print(report.table(result["cases"][-1], device.type == "cuda"))
        report.write_json(out / f"{label}.json", result)
        report.append_csv(out / "kernels.csv", operator.NAME, result["cases"][-1], environment)
    plots.draw(result, out / f"{label}.png")
    return result


def choose(
    ways: list[Way], against: list[str] | None, ours: list[str] | None, device: torch.device
) -> list[Way]:
    """Of ours and of the peers those asked for; by default all of ours, and the peers that tell something here."""
    own = [way.name for way in ways if way.ours]
    peers = [way.name for way in ways if not way.ours]
    usual = [name for name in peers if name not in NOT_BY_DEFAULT[device.type]]
    wanted = [*_named("--ours", ours, own, own), *_named("--against", against, peers, usual)]
    return [way for way in ways if way.name in wanted]


def _named(option: str, asked: list[str] | None, known: list[str], usual: list[str]) -> list[str]:
    if asked is None:
        return usual
    if asked in (["all"], ["none"]):
        return known if asked == ["all"] else []
    for name in asked:
        if name not in known:
            raise UserError(f"{option} {name}: there is no such way to compute it; {nearest(name, known)}")
    return asked


def select(specs: list[Any], patterns: list[str] | None) -> list[Any]:
    """Specs whose names match one of the patterns (all without patterns)."""
    if not patterns:
        return specs
    for pattern in patterns:
        if not any(fnmatch.fnmatch(spec.name, pattern) for spec in specs):
            names = ", ".join(spec.name for spec in specs[:3])
            raise UserError(
                f"--shapes '{pattern}' matches none of the {len(specs)} shapes, such as {names} (--list)"
            )
    return [spec for spec in specs if any(fnmatch.fnmatch(spec.name, pattern) for pattern in patterns)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operator", choices=operators.NAMES)
    parser.add_argument(
        "--shapes", nargs="+", metavar="PATTERN", help="names as --list has them; * and ? are wild"
    )
    parser.add_argument("--against", nargs="+", metavar="PEER", help="peers by name, 'all' or 'none'")
    parser.add_argument(
        "--ours", nargs="+", metavar="WAY", help="of ours only these (default: all that run here)"
    )
    parser.add_argument(
        "--grid", choices=shapes.GRIDS, default="core", help="which shapes there are (default core)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the shapes and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument(
        "--seconds", type=positive(float), default=20.0, help="of timing a shape (default 20)"
    )
    parser.add_argument("--rounds", type=positive(int), help="instead: timed rounds of every way")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument(
        "--threads", type=positive(int), help="torch's on CPU (default: as many as torch takes)"
    )
    parser.add_argument("--label", help="name of the JSON and the plot (default: the operator's)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
