"""Memory of a long sequence over processes (train.context): what each keeps, and its peak, for 1, 2, 4, ... of them.

python benchmarks/training/context.py --length 16384 --context 1 2 4

A step of an HSTU encoder with both biases and dropout, forward and backward, on one sequence; CPUs and gloo, one thread
a process.  Prints a table and writes benchmarks/results/training-context.json; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from gr.errors import UserError, program  # noqa: E402
from gr.models.cut import cut  # noqa: E402
from gr.models.hstu import HSTU  # noqa: E402
from gr.models.init import initialise  # noqa: E402
from gr.models.layout import JaggedLayout  # noqa: E402
from gr.processes import Axis  # noqa: E402
from gr.train import environment  # noqa: E402

METHOD = (
    "Each number of processes starts afresh, and a process first takes a step of WARM_UP rows, so that libraries and "
    "their threads have what they keep.  kept_mib: the distinct memory of all tensors that autograd holds when the "
    "forward pass is over, parameters apart.  peak_mib: how far the process's resident memory (VmHWM) rises above what "
    "it was before the step (VmRSS), backward pass and all scratch included.  Of the processes the highest figure "
    "counts.  seconds: of the step, of the slowest process, and of little meaning where processes share cores."
)
WARM_UP = 256
MIB = 2**20


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not Path("/proc/self/status").exists():
        raise UserError("peak memory is read from /proc, which this system hasn't: run it on Linux")
    results = []
    for size in options.context:
        found = measure(size, options)
        results.append(
            {
                "context": size,
                "rows": max(each["rows"] for each in found),
                **{
                    name: round(max(each[name] for each in found), 1)
                    for name in ("kept_mib", "peak_mib", "seconds")
                },
                "processes": found,
            }
        )
        print(f"{size}: {results[-1]['peak_mib']:,.1f} MiB", flush=True)
    results = sorted([*results, *kept(options)], key=lambda result: result["context"])
    show(results, options)
    write(results, options)
    return 0


def measure(size: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """The figures of each of ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (size, folder, vars(options)), nprocs=size)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def _process(rank: int, size: int, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    axis = Axis(rank, size, dist.group.WORLD)
    config = HSTU.Config.model_validate(
        {
            "layers": options["layers"],
            "heads": options["heads"],
            "qk_dim": options["dim"] // options["heads"],
            "v_dim": options["dim"] // options["heads"],
            "activation": options["activation"],
        }
    )
    encoder = config.build(options["dim"], options["length"])
    initialise(encoder, seed=1)
    step(encoder, axis, WARM_UP)
    dist.barrier()
    before = memory("VmRSS")
    figures = step(encoder, axis, options["length"])
    dist.barrier()
    figures["peak_mib"] = memory("VmHWM") - before
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def step(encoder: HSTU, axis: Axis, length: int) -> dict[str, float]:
    """Forward and backward on one sequence, its action an hour apart."""
    times_T = torch.arange(length + 1) * 3600
    layout = JaggedLayout(
        torch.tensor([0, length]), (length,), length, times_T[1:], times_T[:-1], dropout_key=1
    )
    if axis.size > 1:
        layout = cut(layout, axis)
    dim = encoder.layers[0].uvqk.weight.shape[1]
    torch.manual_seed(1)
    x_TD = torch.randn(layout.rows, dim, requires_grad=True)
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = encoder(x_TD, layout)
    out_TD.backward(torch.ones_like(out_TD))
    seconds = time.perf_counter() - started
    return {"rows": layout.rows, "kept_mib": sum(kept.values()) / MIB, "seconds": seconds}


def memory(which: str) -> float:
    """MiB of this process, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) / 1024


def show(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    title = (
        f"{options.layers} HSTU layers ({options.activation}), D {options.dim}, {options.heads} heads, one sequence of "
        f"{options.length:,}: MiB a process"
    )
    table = Table("processes", "rows of each", "kept", "of one's", "peak", "of one's", title=title)
    one = results[0]
    for result in results:
        table.add_row(
            str(result["context"]),
            f"{result['rows']:,}",
            *(
                cell
                for name in ("kept_mib", "peak_mib")
                for cell in (f"{result[name]:,.1f}", f"{result[name] / one[name]:.3f}")
            ),
        )
    Console(width=110).print(table)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("length", "dim", "heads", "layers", "activation")}


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """With --add, what the file has of other numbers of processes."""
    if not options.add:
        return []
    record = json.loads(options.json.read_text())
    if record["settings"] != settings_of(options):
        raise UserError(f"'{options.json}' was made with other settings: leave --add out")
    return [result for result in record["results"] if result["context"] not in options.context]


def write(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    record = {
        "benchmark": "context",
        "method": METHOD.replace("WARM_UP", str(WARM_UP)),
        "environment": environment.record(),
        "settings": settings_of(options),
        "results": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {options.json}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=16384, help="rows of the sequence (default 16384)")
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--dim", type=int, default=256, help="D; a head has D / heads (default 256)")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--activation", choices=["silu", "softmax"], default="silu")
    parser.add_argument("--add", action="store_true", help="to the file's figures, of the same settings")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "training-context.json"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
