"""What a person reads on the terminal, and what is kept: JSON of a run, CSV that grows from run to run."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.kernels.problem import PASSES
from gr.errors import UserError
from gr.train import environment

MIB, GIB = 2**20, 2**30
FIGURES = ("rounds", "ms_p10", "ms_p50", "ms_p90", "tflops", "gb_per_s", "of_matmul", "of_copy")
OF_THE_WAY = ("peak_bytes", "kept_bytes_per_token", "cpu_ms_p50", "why")
OF_THE_RUN = ("utc", "commit", "gpu", "driver", "cpu", "threads", "torch", "triton", "cuda", "command")
COLUMNS = ("operator", "case", "way", "ours", "pass", *FIGURES, *OF_THE_WAY, *OF_THE_RUN)


def record(command: list[str]) -> dict[str, Any]:
    """The environment of a run: a JSON-able dict with OF_THE_RUN in it."""
    full = environment.record()
    gpu = full["gpus"][0]["name"] if full["gpus"] else None
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": full["code"],
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cpu": full["cpu"]["model"],
        "threads": full["cpu"]["torch_threads"],
        "torch": full["packages"]["torch"],
        "triton": full["packages"]["triton"],
        "cuda": full["cuda"],
        "command": " ".join(command),
        "details": {**full, "argv": command},
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def subject(case: dict[str, Any]) -> dict[str, Any] | None:
    """Our first way that was timed: what the table compares the others with."""
    return next((way for way in case["ways"] if way["ours"] and "both" in way), None)


@dataclass(frozen=True)
class Rates:
    """What a case's speed is told in: operations, or bytes where what it does is to move them."""

    unit: str
    per: float
    figure: str
    ceiling: str
    share: str

    def speeds(self, way: dict[str, Any]) -> str:
        return _joined(way, lambda found: digits(found[self.figure] / self.per))

    def shares(self, way: dict[str, Any]) -> str:
        return _joined(way, lambda found: f"{found[self.share]:.0%}")


def rates(case: dict[str, Any], on_gpu: bool) -> Rates:
    if not case["flops"]["both"]:
        return Rates("GB/s", 1.0, "gb_per_s", "copy", "of_copy")
    unit, per = ("TFLOP/s", 1.0) if on_gpu else ("GFLOP/s", 1e-3)
    return Rates(unit, per, "tflops", "matmul", "of_matmul")


def passes(way: dict[str, Any]) -> list[str]:
    """Those that were timed."""
    return [which for which in PASSES if which in way]


def _joined(way: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
    """Of every pass; "-" for one that there is not."""
    return " / ".join(text(way[which]) if which in way else "-" for which in PASSES)


def milliseconds(way: dict[str, Any]) -> list[str]:
    """p50 (p10 to p90) of every pass, "" for one that there is not."""
    return [
        f"{digits(p['ms_p50'])} ({digits(p['ms_p10'])}-{digits(p['ms_p90'])})" if p else ""
        for p in (way.get(which) for which in PASSES)
    ]


def speedups(way: dict[str, Any], first: dict[str, Any] | None) -> str:
    """How many times as fast the first way is; "" for itself."""
    if first is None or way is first:
        return ""
    ratios = {which: {"ratio": first[which]["speedup_over"][way["way"]]} for which in passes(way)}
    return _joined(ratios, lambda found: f"{found['ratio']:.2f}x")


def table(case: dict[str, Any], on_gpu: bool) -> Table:
    """One row a way. Milliseconds are p50 (p10 to p90)."""
    first = subject(case)
    name = first["way"] if first else "ours"
    rate = rates(case, on_gpu)
    shown = Table(title=f"{case['name']}  ({case['tokens']:,} rows)", title_justify="left")
    shown.add_column("way")
    for heading in ("forward ms", "backward ms", "both ms"):
        shown.add_column(heading, justify="right")
    for heading in (
        f"{rate.unit} f / b / both", f"% of {rate.ceiling}", "GB/s (of copy)", "peak MiB", "kept B/row",
    ):  # fmt: skip
        shown.add_column(heading, justify="right")
    if not on_gpu:
        shown.add_column("CPU ms", justify="right")  # of all threads: what other programs disturb least
    shown.add_column(f"{name} is faster by f / b / both", justify="right")
    for way in case["ways"]:
        if "both" not in way:
            continue
        both = way["both"]
        shown.add_row(
            f"[bold]{way['way']}[/]" if way["ours"] else way["way"],
            *milliseconds(way),
            rate.speeds(way),
            rate.shares(way),
            f"{digits(both['gb_per_s'])} ({both['of_copy']:.0%})",
            "" if way["peak_bytes"] is None else f"{way['peak_bytes'] / MIB:,.0f}",
            "" if way["kept_bytes_per_token"] is None else f"{way['kept_bytes_per_token']:,.0f}",
            *([] if on_gpu else [digits(way["cpu_ms_p50"])]),
            speedups(way, first),
        )
    shown.caption, shown.caption_justify = "\n".join(_caption(case)), "left"
    return shown


def _caption(case: dict[str, Any]) -> list[str]:
    """Why ways have no times (the wrong ones first), and what to know of those that have."""
    untimed: dict[str, list[str]] = {}
    lines = []
    for way in case["ways"]:
        if way["red"]:
            lines.append(f"[not dim red]{way['way']}: {_escape(way['why'])}[/]")
        elif "both" not in way:
            untimed.setdefault(way["why"], []).append(way["way"])
    lines += [f"not timed: {', '.join(names)}: {_escape(why)}" for why, names in untimed.items()]
    return lines + [f"{w['way']}: {_escape(w['note'])}" for w in case["ways"] if w["note"] and "both" in w]


def digits(value: float) -> str:
    """Three, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def write_json(file: Path, run: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_rounded(run), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Floats to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def append_csv(file: Path, operator: str, case: dict[str, Any], environment: dict[str, Any]) -> None:
    """A row for every way and pass; a way without figures has one row that says why."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = not file.exists() or file.stat().st_size == 0
    if not fresh:
        with file.open(newline="") as lines:
            if tuple(next(csv.reader(lines))) != COLUMNS:
                raise UserError(f"'{file}' has other columns than this version writes: move it away")
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS)
        if fresh:
            writer.writeheader()
        for way in case["ways"]:
            for which in passes(way) or ("",):
                writer.writerow(
                    {
                        "operator": operator,
                        "case": case["name"],
                        "way": way["way"],
                        "ours": way["ours"],
                        "pass": which,
                        **{name: way[which][name] for name in FIGURES if which},
                        **{name: way.get(name) for name in OF_THE_WAY},
                        **{name: environment[name] for name in OF_THE_RUN},
                    }
                )
