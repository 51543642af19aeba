"""One report of a folder of results: report.md with what must be reached, a table a case, and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kernels import must_reach, operators, resource_table
from benchmarks.kernels.report import MIB, OF_THE_RUN, digits, milliseconds, rates, speedups, subject

REPORT = "report.md"


def read(folder: Path) -> must_reach.Runs:
    """The runs whose JSON the folder has, by their labels: the operator's name, or that and what was measured."""
    labels = sorted(
        (file.stem for file in folder.glob("*.json") if file.stem.partition("-")[0] in operators.NAMES),
        key=lambda label: (operators.NAMES.index(label.partition("-")[0]), label),
    )
    return {label: json.loads((folder / f"{label}.json").read_text()) for label in labels}


def write(folder: Path, device: str, steps: dict[str, dict[str, Any]]) -> Path:
    """steps: name -> {"command", "status", "seconds", "log"}, in the order they are listed."""
    runs = read(folder)
    lines = ["# Kernels measured", ""]
    if runs:
        environment = next(iter(runs.values()))["environment"]
        lines += [
            f"{name}: {environment[name]}  " for name in OF_THE_RUN if name != "command" and environment[name]
        ]
    lines += ["", "| step | result | seconds | command |", "|---|---|---:|---|"]
    for name, step in steps.items():
        lines.append(f"| {name} | {step['status']} | {step['seconds']:.0f} | `{step['command']}` |")
    lines += ["", "## Must reach", "", "| | on | | measured |", "|---|---|---|---|"]
    for verdict in must_reach.judge(runs, device):
        bold = f"**{verdict.status}**" if verdict.status == "missed" else verdict.status
        lines.append(f"| {verdict.text} | {verdict.on} | {bold} | {'; '.join(verdict.measured)} |")
    for name, run in runs.items():
        lines += ["", f"## {name}", "", run["formula"], "", _ceilings(run)]
        if (folder / f"{name}.png").exists():
            lines += ["", f"![{name}]({name}.png)"]
        for case in run["cases"]:
            lines += ["", *_case(case, device)]
    if device == "cuda":
        lines += ["", "## Resources, as recorded", "", *resource_table.lines()]
    file = folder / REPORT
    file.write_text("\n".join(lines) + "\n")
    return file


def _ceilings(run: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{dtype} {rate:,.3g} TFLOP/s" for dtype, rate in run["ceilings"]["matmul_tflops"].items()
    )
    return f"Ceilings in this process: matrix product {rates}; copy {run['ceilings']['copy_gb_per_s']:,.0f} GB/s."


def _case(case: dict[str, Any], device: str) -> list[str]:
    first = subject(case)
    rate = rates(case, device == "cuda")
    lines = [
        f"**{case['name']}** ({case['tokens']:,} rows); ms p50 (p10-p90)",
        "",
        f"| way | forward | backward | both | CPU ms | {rate.unit} f / b / both | % of {rate.ceiling} | peak MiB | "
        f"kept B/row | {first['way'] if first else 'ours'} is faster by f / b / both |",
        "|---|---|---|---|---:|---|---|---:|---:|---|",
    ]
    for way in case["ways"]:
        if "both" not in way:
            lines.append(f"| {way['way']} | {way['why']} | | | | | | | | |")
            continue
        cpu = digits(way["cpu_ms_p50"]) if "cpu_ms_p50" in way else ""
        peak = "" if way["peak_bytes"] is None else f"{way['peak_bytes'] / MIB:,.0f}"
        lines.append(
            f"| {way['way']} | {' | '.join(milliseconds(way))} | {cpu} | {rate.speeds(way)} | {rate.shares(way)} | "
            f"{peak} | {way['kept_bytes_per_token']:,.0f} | {speedups(way, first)} |"
        )
    return lines
