"""MaxSim scores of many items for one user, beside the bare matrix product of the same numbers.

    python benchmarks/scoring/items.py --out results.json

Sides, in turns, in one process: the bare product of the user's heads with all items' heads, a chunk at a time into one
buffer (nothing is kept of it: the least that any exact scoring has to do); gr's scores; the scores written plainly, as
the maximum of that product; the last layer alone; a search by encodings with an exact re-scoring.  The median over
turns and the fastest turn are given: on a shared machine the fastest says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("", "kernels")]

from gr.models.two_tower.scoring import (  # noqa: E402
    CHUNK,
    Encoding,
    last_layer,
    score_all,
    search,
)


def bare_product(user_HK: Tensor, flat_NK: Tensor, rows: int) -> None:
    out_RH = user_HK.new_empty(rows, user_HK.shape[0])
    for start in range(0, len(flat_NK), rows):
        part = flat_NK[start : start + rows]
        torch.mm(part, user_HK.T, out=out_RH[: len(part)])


def plainly(user_HK: Tensor, heads_IJK: Tensor) -> Tensor:
    items, heads, _ = heads_IJK.shape
    step = 256
    parts = []
    for start in range(0, items, step):
        part = heads_IJK[start : start + step]
        parts.append((part.flatten(0, 1) @ user_HK.T).view(len(part), heads, -1).amax(1).sum(1))
    return torch.cat(parts)


def turns(sides: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Milliseconds of each side in each turn, all sides one after another in a turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(count + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument(
        "--encoding", type=int, nargs=3, default=[10, 3, 8], metavar=("REPETITIONS", "BITS", "PROJECTED")
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(1)
    user_HK = torch.randn(options.layers * options.heads, options.width, generator=generator)
    heads_JIK = torch.randn(options.heads, options.items, options.width, generator=generator)
    heads_IJK = heads_JIK.transpose(0, 1).contiguous()
    encoding = Encoding.of(options.width, *options.encoding)
    encoded_IE = torch.randn(options.items, encoding.dim, generator=generator)  # its content changes no time
    with torch.inference_mode():
        wrong = (score_all(user_HK, heads_JIK) - plainly(user_HK, heads_IJK)).abs().max().item()
        sides: dict[str, Callable[[], object]] = {
            "bare product": lambda: bare_product(user_HK, heads_IJK.flatten(0, 1), CHUNK),
            "gr, all layers": lambda: score_all(user_HK, heads_JIK),
            "written plainly": lambda: plainly(user_HK, heads_IJK),
            "gr, last layer": lambda: score_all(last_layer(user_HK, options.layers), heads_JIK),
            f"gr, {options.candidates} by encodings": lambda: search(
                user_HK, heads_JIK, encoding, encoded_IE, 100, options.candidates
            ),
        }
        times = turns(sides, options.turns)
    fastest = {name: min(values) for name, values in times.items()}
    bare = fastest["bare product"]
    print(
        f"{options.items:,} items of {options.heads} heads of {options.width}, {len(user_HK)} heads of the user"
    )
    print(f"{'':<24}{'median ms':>10}{'fastest':>10}{'of bare':>9}")
    for name, values in times.items():
        print(f"{name:<24}{statistics.median(values):>10.1f}{min(values):>10.1f}{min(values) / bare:>8.2f}x")
    print(f"the largest difference between gr's scores and those written plainly: {wrong:.1e}")
    if options.out:
        told = {**vars(options), "torch": torch.__version__, "milliseconds": times, "difference": wrong}
        Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
