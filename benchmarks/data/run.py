"""The data side's report: every benchmark of this folder, and what it must reach.

    python benchmarks/data/run.py [--quick] [--only loader prepare ...] [--out DIR]

Each part is a program of its own, whose table comes first; the last table sets what was measured beside what is
required, and is written to data.json.  All of it takes ten to twenty minutes of two cores and 10 GB of scratch space;
``--quick`` takes small datasets, on which rates are lower and the growth of memory tells little.  ``--only`` redoes
these parts; the others' figures are those that the folder holds.  Ends with 1 if a program failed, not where something
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """A program.  full, quick: its arguments.  judge: the verdicts on the JSON that it writes.  proves: what is shown
    by a program that writes none, if it ends well."""

    program: tuple[str, ...]
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    judge: Callable[[dict[str, Any]], Iterator[Verdict]] = lambda result: iter(())
    proves: str = ""


@dataclass(frozen=True)
class Verdict:
    what: str
    required: str
    measured: str
    reached: bool


def at_least(what: str, measured: float, least: float, said: str = "{:.2f}") -> Verdict:
    return Verdict(what, f"at least {said.format(least)}", said.format(measured), measured >= least)


def of_loader(result: dict[str, Any]) -> Iterator[Verdict]:
    """The engine that reads in the process: speed of a core, beside bare pyarrow, and memory while the data grow."""

    def median(row: dict, one: Callable[[dict], float]) -> float:
        return statistics.median(one(each) for each in row["rounds"][1:])

    def speed(part: dict) -> float:
        return part["actions"] / max(part["core_seconds"], 1e-9)

    rows = [row for row in result["rows"] if row["engine"] == "arrow"]
    for row in rows:
        what = f"loader, {row['shape']}, {row['actions']:,} actions"
        of_core = median(row, lambda each: speed(each["engine"]))
        yield at_least(f"{what}: actions/s of a core", of_core, 15e6, "{:,.0f}")
        ratio = median(row, lambda each: speed(each["engine"]) / speed(each["bare"]))
        yield at_least(f"{what}: of bare pyarrow", ratio, 0.5)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        peaks = [row["peak_bytes"] / 2**20 for row in rows if row["shape"] == shape]
        growth = peaks[-1] / peaks[0] - 1
        measured = f"{peaks[0]:,.0f} to {peaks[-1]:,.0f} MiB, {growth:+.1%}"
        yield Verdict(
            f"loader, {shape}: memory, smallest to largest", "within 10 %", measured, abs(growth) <= 0.1
        )


def of_prepare(result: dict[str, Any]) -> Iterator[Verdict]:
    """Of a small log a cluster's start is most: its speed is judged by the largest."""
    largest = max(row["log_actions"] for row in result["rows"])
    for actions in dict.fromkeys(row["log_actions"] for row in result["rows"]):
        made = {row["engine"]: row for row in result["rows"] if row["log_actions"] == actions}
        rate = {engine: actions / row["seconds"] for engine, row in made.items()}
        what = f"prepare, {actions:,} actions"
        yield at_least(f"{what}: actions/s in process", rate["process"], 2e6, "{:,.0f}")
        ray = at_least(f"{what}: Ray's speed, of that", rate["ray"] / rate["process"], 0.5)
        yield ray if actions == largest else replace(ray, required="stated", reached=True)
        peak = made["ray"]["peak_bytes"] / 2**20
        yield Verdict(f"{what}: memory of all of Ray's processes", "stated", f"{peak:,.0f} MiB", True)


def of_object_store(result: dict[str, Any]) -> Iterator[Verdict]:
    for latency in dict.fromkeys(row["latency_ms"] for row in result["results"]):
        speeds = {row["way"]: row["mib_per_s"] for row in result["results"] if row["latency_ms"] == latency}
        ours, theirs = ([v for k, v in speeds.items() if k.startswith(who)] for who in ("gr,", "pyarrow,"))
        for how, one, other in zip(("one at a time", "eight at a time"), ours, theirs):
            yield at_least(f"S3, {latency:g} ms a request, {how}: of pyarrow's own reading", one / other, 0.8)


def of_wait(result: dict[str, Any]) -> Iterator[Verdict]:
    for row in result["rows"]:
        share = row["share"]
        yield Verdict(
            f"waiting for data, {row['engine']}: of steps", "below 2 %", f"{share:.2%}", share < 0.02
        )


PARTS = {
    "loader": Part(
        ("loader.py",),
        ("--actions", "1e6", "1e7", "1e8"),
        ("--engines", "arrow", "--actions", "1e5", "1e6", "--seconds", "1"),
        of_loader,
    ),
    "prepare": Part(
        ("prepare.py", "--engines", "process", "ray"),
        ("--actions", "1e7", "1e8"),
        ("--actions", "1e6"),
        of_prepare,
    ),
    "object_store": Part(
        ("object_store.py",), (), ("--users", "8192", "--rounds", "3", "--latency-ms", "0"), of_object_store
    ),
    "wait": Part(("wait.py",), (), ("--steps", "20", "--actions", "1e5"), of_wait),
    "shuffle": Part(("shuffle.py",)),
    "kills": Part(
        ("-m", "pytest", "-q", "tests/unit/test_order_properties.py"),
        proves="a thousand kills, resumed by other numbers of ranks: every sample once, in one order",
    ),
}
"""In the order in which they run: what is timed comes first."""


def command(name: str, quick: bool, out: Path) -> list[str]:
    part = PARTS[name]
    chosen = part.quick if quick else part.full
    if part.proves:
        return [sys.executable, *part.program, *chosen]
    program, *first = part.program
    return [
        sys.executable,
        str(HERE / program),
        *first,
        *chosen,
        "--json",
        os.path.relpath(file_of(name, out)),
    ]


def file_of(name: str, out: Path) -> Path:
    return out / f"data_{name}.json"


def held(out: Path) -> list[dict[str, Any]]:
    """The verdicts that the folder holds."""
    file = out / "data.json"
    return json.loads(file.read_text()) if file.is_file() else []


def verdicts(statuses: dict[str, int], out: Path) -> Iterator[Verdict]:
    """On what ran, by its exit status, and on what the folder holds of parts that didn't."""
    earlier = {one["what"]: Verdict(**one) for one in held(out)}
    for name, part in PARTS.items():
        if statuses.get(name):
            yield Verdict(name, "runs", "failed", False)
        elif part.proves and name in statuses:
            yield Verdict(part.proves, "holds", "holds", True)
        elif part.proves in earlier:
            yield earlier[part.proves]
        elif file_of(name, out).is_file():
            yield from part.judge(json.loads(file_of(name, out).read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small datasets, a few minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    statuses = {}
    for number, name in enumerate(args.only, 1):
        print(f"[{number}/{len(args.only)}] {name}", flush=True)
        environment = os.environ | {"GR_TEST_ALL": "1"}  # what can't be tested here has failed
        statuses[name] = subprocess.run(command(name, args.quick, out), cwd=ROOT, env=environment).returncode
    found = list(verdicts(statuses, out))
    table = Table("what", "required", "measured", "", title="must reach", title_justify="left")
    missed = "missed, on small data" if args.quick else "[red]missed"
    for one in found:
        table.add_row(one.what, one.required, one.measured, "reached" if one.reached else missed)
    Console().print(table)
    (out / "data.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(f"written: {out / 'data.json'}")
    return 1 if any(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
