"""The recorded resources of the kernels with tensor-core work on sm_90, as a Markdown table.

    python benchmarks/kernels/resource_table.py

Reads tests/kernels/resources.json, which `python benchmarks/kernels/resources.py --record` writes.
"""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "resources.json"


def lines(record: Path = RECORD) -> list[str]:
    """Head and rows; none where there is no record."""
    if not record.exists():
        return []
    found = json.loads(record.read_text())
    table = [
        f"| sm_90, Triton {found['triton']} | registers | spills | shared memory | wgmma | mma.sync |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in sorted(found["cases"].items()):
        if name.endswith(".sm_90") and case["wgmma"] + case["mma_sync"]:
            table.append(
                f"| {name.removesuffix('.sm_90')} | {case['registers']} | {case['spills']} | {case['shared']:,} | "
                f"{case['wgmma']} | {case['mma_sync']} |"
            )
    return table


if __name__ == "__main__":
    print("\n".join(lines()) or f"there is no {RECORD}")
