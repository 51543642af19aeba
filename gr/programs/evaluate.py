"""Evaluate a trained run on a held-out split: every user once, the metrics of its model beside those of baselines.

python -m gr evaluate --run runs/NAME --split test --baselines popularity,last_item --buckets
torchrun --standalone --nproc-per-node 2 -m gr.programs.evaluate runs/NAME eval.exclude=all
"""

from __future__ import annotations

import argparse
import sys

from gr.errors import UserError, program
from gr.launcher import end_with_agent
from gr.programs._arguments import add_data_path, add_dim, add_run, names, new_parser, settle_run

OPTIONS = {"eval.splits": "--split", "eval.baselines": "--baselines", "eval.buckets": "--buckets"}
"""Keys of ``eval`` that are options here."""
TIMEOUT = "train.timeout"
OF_TRAINING = ("eval.every_epochs", "eval.every_steps")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run(parser)
    add_data_path(parser)
    add_dim(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="eval.key=value",
        help="changes to the run's eval section; train.timeout=SECONDS, that an exchange of processes may take",
    )
    parser.add_argument("--split", default="test", help="a held-out split: test (default) or valid")
    parser.add_argument(
        "--baselines",
        default="",
        metavar="A,B",
        help="popularity, last_item, item_knn, oracle; of a ranking model: prior",
    )
    parser.add_argument(
        "--buckets", action="store_true", help="also by history length and, of ranks, item popularity"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    options = parser.parse_intermixed_args(arguments)
    settle_run(parser, options)
    for override in options.overrides:
        if (key := override.partition("=")[0]) in OPTIONS:
            raise UserError(f"'{key}' is not looked at when evaluating: say {OPTIONS[key]}", everywhere=True)
        if key != TIMEOUT and (not key.startswith("eval.") or key in OF_TRAINING):
            raise UserError(
                f"'{override}' cannot change when evaluating: only {TIMEOUT} can, and eval.* but for "
                f"{' and '.join(OF_TRAINING)} (--data-path says where the data is)",
                everywhere=True,
            )
    return options


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end_with_agent()
    overrides = [*options.overrides, f"eval.buckets={str(options.buckets).lower()}"]
    baselines = names(options.baselines)

    from rich.console import Console

    from gr.data.outputs import delivered
    from gr.eval.tables import buckets_tables, results_table
    from gr.train.comparison import compare, to_json

    given = (options.checkpoint, options.json, options.data_path, options.dim)
    done = compare(options.run, options.split, baselines, overrides, *given)
    if done.is_main:
        console = Console()
        cut = "" if options.dim is None else f", the first {options.dim} numbers of vectors"
        console.print(results_table(done.results, f"{options.run}, {done.split}, step {done.step:,}{cut}"))
        own = done.results[done.model]
        for table in buckets_tables(own, done.model):
            console.print(table)
        console.print(f"{done.model}: {own.users_per_second:,.0f} {own.judged}/s", highlight=False)
        if options.json:
            with delivered(options.json) as scratch:
                scratch.write_text(to_json(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
