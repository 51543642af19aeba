"""A training step shared out to processes: speed, exposed communication, memory, and bytes against their least.

    python benchmarks/training/scaling.py                                    # 1, 2 and 4 processes, ML-1M's shape
    python benchmarks/training/scaling.py --processes 1 --tables local row_wise --engines ddp   # TorchRec's overhead
    torchrun --nnodes ... benchmarks/training/scaling.py --device cuda       # as many as it was started with

Prints a table a number of processes and writes benchmarks/results/scaling.json and .png; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces itself otherwise

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.training import exchanges, member, scaling_report  # noqa: E402
from benchmarks.training.cases import ENGINES, TABLES, cases  # noqa: E402
from benchmarks.training.run import load  # noqa: E402
from benchmarks.training.shapes import ML_1M, SHAPES, Shape  # noqa: E402
from gr.errors import UserError, program  # noqa: E402
from gr.launcher import launched  # noqa: E402
from gr.processes import Processes, processes  # noqa: E402
from gr.train import environment  # noqa: E402

TIMEOUT_SECONDS = 3600
TINY = Shape("tiny", 300, 12, 8, 1, 1, 8, 8, 8, 0.1, users=64, batch=16)
"""For ``--quick``: whether everything works, not how fast."""


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if launched().ranks > 1 or options.member:
        with processes(options.device, options.threads) as joined:
            found = measured(options, joined)
            if joined.is_main:
                report([found], options)
        return 0
    counts = options.processes or ([1, 2] if options.quick else _counts(options.device))
    report([in_group(count, sys.argv[1:] if arguments is None else arguments) for count in counts], options)
    return 0


def measured(options: argparse.Namespace, joined: Processes) -> dict[str, Any]:
    """What these processes measure together: a JSON-able dict."""
    shape, samples, source = load(TINY if options.quick else SHAPES[options.shape], options.data)
    if options.batch:
        shape = replace(shape, batch=options.batch)
    chosen = cases(options.tables, options.engines, options.every, joined.world.size)
    if options.quick:
        chosen = chosen[:2]
    seconds = 0.0 if options.quick else options.seconds
    found = member.measure(shape, samples, chosen, options.set, seconds, joined)
    return {"shape": asdict(shape), "source": source, "users": len(samples), "set": options.set, **found}


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Of a member of a group that this program started, the figures alone, for the one that started it."""
    file: Path = options.json
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.member:
        file.write_text(json.dumps(results[0]))
        return
    record = {"benchmark": "scaling", "method": exchanges.__doc__, "environment": environment.record()}
    file.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
    scaling_report.plot(results, file.with_suffix(".png"))
    console = Console(width=140)
    for result in results:
        scaling_report.show(result, console)
    console.print(f"\nwritten: {file} and {file.with_suffix('.png').name}")


def in_group(count: int, arguments: list[str]) -> dict[str, Any]:
    """This program on ``count`` new processes of this machine, with the same arguments; what they measured."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        file = Path(folder) / "figures.json"
        members = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in {**place, **meeting}.items()}
            command = [sys.executable, __file__, *arguments, "--member", "--json", str(file)]
            members.append(
                subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)
            )
        said = [one.communicate(timeout=TIMEOUT_SECONDS)[1].strip() for one in members]
        if any(one.returncode for one in members):
            first = next(text for one, text in zip(members, said, strict=True) if one.returncode)
            raise UserError(f"measuring on {count} processes failed: {first[-600:].removeprefix('error: ')}")
        return json.loads(file.read_text())  # type: ignore[no-any-return]


def _counts(device: str) -> list[int]:
    """1, 2 and 4 processes; on GPUs 1, 2, 4, ... as far as there are GPUs, and all of them."""
    gpus = torch.cuda.device_count()
    if device == "cpu" or not gpus:
        return [1, 2, 4]
    powers = [1 << power for power in range(gpus.bit_length())]
    return sorted({*powers, gpus})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default=ML_1M.name)
    parser.add_argument("--data", type=Path, help="a prepared ML-1M; without it its sequences are generated")
    parser.add_argument("--batch", type=int, help="sequences of a global batch (default: the shape's, 128)")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="how many (default 1 2 4; on GPUs up to all of them)"
    )
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument(
        "--every", action="store_true", help="every table under every engine, not only the first"
    )
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="of steps in turns, a number of processes (default 45)"
    )
    parser.add_argument("--threads", type=int, help="of a process (default: its share of the cores)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key.key=value", help="of the config of every case"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two cases, a few steps")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.json")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
