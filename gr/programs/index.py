"""Write the item heads of a pre-ranking run (IntTower), and measure what a search in front of exact scores finds.

    python -m gr index --run runs/NAME --out heads.safetensors
    python -m gr index --run runs/NAME --out heads.safetensors --users 200 --k 100 --candidates 200,500,1000
    python -m gr index --run runs/NAME --out heads.safetensors --evaluate test

Times are this process's, with the threads that torch takes.
"""

from __future__ import annotations

import argparse
import sys

from gr.errors import UserError, program
from gr.programs._arguments import add_data_path, add_run, new_parser, refuse_torchrun, settle_run


@program
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_run(parser)
    add_data_path(parser)
    parser.add_argument("--out", required=True, help="the file to write, safetensors")
    parser.add_argument(
        "--users", type=int, default=0, help="users to measure the search with (default: none)"
    )
    parser.add_argument("--k", type=int, help="best items to find for each of them (default: 100)")
    counts = "so many are scored exactly (default: 200,500,1000)"
    parser.add_argument("--candidates", type=_counts, metavar="200,500", help=counts)
    parser.add_argument(
        "--evaluate", metavar="SPLIT", help="also judge scores by the last layer alone on a split"
    )
    options = parser.parse_args(arguments)
    settle_run(parser, options)
    refuse_torchrun("index", "it measures one process")
    searched = {name: getattr(options, name) for name in ("k", "candidates")}
    searched = {name: given for name, given in searched.items() if given is not None}
    for name, least in (("users", 0), ("k", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise UserError(f"--{name} is {given}: give {least} or more")
    if searched and not options.users:
        raise UserError(f"--{min(searched)} is of a search that is measured: say for how many --users, too")

    from gr.data.outputs import output_file
    from gr.train.item_heads import item_heads, judged, measure
    from gr.train.runs import open_run

    output_file(options.out)
    run = open_run(options.run, options.checkpoint, data_path=options.data_path)
    heads = item_heads(run)
    heads.save(options.out)
    per_item, items, width = heads.heads_JIK.shape
    print(f"{options.out}: {items:,} items, {per_item} heads of {width} each, step {heads.step}")
    if options.users > 0:
        found = measure(run, heads, users=options.users, **searched)
        print(
            f"{found.users} users, the {found.k} best of {found.items:,} items; a user's time in this process:"
        )
        print(f"  all layers, exact    {found.exact_ms:8.2f} ms")
        print(f"  last layer alone     {found.last_ms:8.2f} ms   recall {found.last_recall:.4f}")
        for count, recall in found.recall.items():
            took = found.searched_ms[count]
            print(
                f"  {count:>6,} by encodings {took:8.2f} ms   recall {recall:.4f}   ({found.encoding} numbers an item)"
            )
    if options.evaluate:
        for name, result in judged(run, options.evaluate).items():
            figures = "  ".join(f"{metric} {result.metrics[metric]:.4f}" for metric in result.shown)
            print(f"{options.evaluate}, {name}: {figures}  ({result.users:,} impressions)")
    return 0


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of different numbers like 200,500")
    return counts


if __name__ == "__main__":
    sys.exit(main())
