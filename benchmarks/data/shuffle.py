"""How good is a shuffle that holds few blocks in memory?

    python benchmarks/data/shuffle.py

The order of ``gr.data.order`` for a row of window sizes, beside a shuffled buffer of the same size over rows in their
stored order (what a reader of files usually has).  Three figures, each 1 for a full shuffle but for chance:

    spread    of batch means of a column by which the rows are *sorted*, which is the worst storage: their standard
              deviation over that of samples drawn from all rows
    together  pairs of samples that share a batch in two epochs, over what chance gives
    follows   the rank correlation of a row's positions in two epochs; 0 for a full shuffle

Sequences are stored by a hash of their user: then no column is sorted, the spread is 1 whatever the window, and what is
left of the window is ``together``.  A stream keeps the log's own order, which may well be sorted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from rich.console import Console
from rich.table import Table

from gr.data.order import Order

RESULTS = Path(__file__).parents[1] / "results" / "data_shuffle.json"
PAIRS = 4
"""Of epochs that are compared."""


def windows(rows: int, block_rows: int, window_blocks: int) -> Iterator[np.ndarray]:
    """Epoch after epoch, the rows in the order in which they are read."""
    order = Order("benchmark", 1, rows, block_rows, window_blocks)
    for epoch in range(PAIRS + 1):
        yield np.concatenate([order.window(epoch, window)[1] for window in range(order.windows)])


def buffered(rows: int, size: int) -> Iterator[np.ndarray]:
    """The same of a buffer of ``size`` rows: a random one of it leaves, the next stored one takes its place."""
    generator = np.random.default_rng(1)
    for _ in range(PAIRS + 1):
        # Of a row that enters at t the time to stay is geometric, 1 / size a turn: the same law, without a loop.
        leaves = np.maximum(np.arange(rows), size) + generator.geometric(1 / size, rows)
        yield np.lexsort((generator.random(rows), leaves))


def figures(epochs: Iterator[np.ndarray], rows: int, batch: int) -> dict[str, float]:
    whole = rows // batch * batch
    column = (np.arange(rows) + 0.5) / rows  # sorted, uniform: variance 1 / 12
    spreads, together, follows = [], [], []
    before = None
    for order in epochs:
        spreads.append(column[order[:whole]].reshape(-1, batch).mean(1).std() / np.sqrt(1 / 12 / batch))
        position = np.empty(rows, np.int64)
        position[order] = np.arange(rows)
        if before is not None:
            pairs = sum(
                int((counts * (counts - 1) // 2).sum())
                for members in before[:whole].reshape(-1, batch)
                for counts in (np.unique(position[members] // batch, return_counts=True)[1],)
            )
            chance = whole / batch * (batch * (batch - 1) / 2) * (batch - 1) / (rows - 1)
            together.append(pairs / chance)
            follows.append(np.corrcoef(np.arange(rows), position[before])[0, 1])
        before = order
    return {
        "spread": float(np.mean(spreads)),
        "together": float(np.mean(together)),
        "follows": float(np.mean(follows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2**18)
    parser.add_argument("--block-rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = []
    for blocks in args.windows:
        held = min(blocks * args.block_rows, args.rows)
        found.append(
            {
                "window_blocks": blocks,
                "share": held / args.rows,
                "windows": figures(windows(args.rows, args.block_rows, blocks), args.rows, args.batch),
                "buffer": figures(buffered(args.rows, held), args.rows, args.batch),
            }
        )
    asked = {key: value for key, value in vars(args).items() if key != "json"}
    args.json.write_text(json.dumps({**asked, "found": found}, indent=1) + "\n")
    show(found, args)
    print(f"written: {args.json}")


def show(found: list[dict], args: argparse.Namespace) -> None:
    title = (
        f"{args.rows:,} rows in blocks of {args.block_rows}, batches of {args.batch}; a full shuffle: 1, 1, 0"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("window", "of the rows", "spread", "together", "follows"):
        table.add_column(heading, justify="right")
    for heading in ("buffer: spread", "together", "follows"):
        table.add_column(heading, justify="right")
    for row in found:
        ours, theirs = row["windows"], row["buffer"]
        table.add_row(
            str(row["window_blocks"]),
            f"{row['share']:.1%}",
            *(f"{of[key]:.2f}" for of in (ours, theirs) for key in ("spread", "together", "follows")),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
