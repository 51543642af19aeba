"""Score the candidates of requests, by a trained ranking run, and write their probabilities to a Parquet file.

python -m gr rank --run runs/NAME --requests requests.parquet --out scores.parquet
"""

from __future__ import annotations

import argparse
import sys

from gr.errors import UserError, program
from gr.programs._arguments import add_data_path, add_run, new_parser, refuse_torchrun, settle_run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run(parser)
    add_data_path(parser)
    asked = (
        "Parquet, a row a request: user_id, item_ids (a list), perhaps time (seconds), and what the model knows of a "
        "request; for model two_tower item_ids, and what it knows of a user"
    )
    parser.add_argument("--requests", required=True, metavar="FILE", help=asked)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="Parquet: the requests, and a list of probabilities a task",
    )
    unknown = (
        "users and items that the dataset doesn't have: refuse them (default), or leave their scores null"
    )
    parser.add_argument("--unknown", choices=["refuse", "null"], default="refuse", help=unknown)
    together = "candidates computed together (default: 256 of a request; for model two_tower 8192 of any)"
    parser.add_argument("--at-once", type=int, metavar="N", help=together)
    options = parser.parse_args(arguments)
    settle_run(parser, options)
    if options.at_once is not None and options.at_once < 1:
        raise UserError(f"--at-once is {options.at_once}: compute one candidate at least")
    return options


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_torchrun("rank", "with a part of the requests each if one isn't enough")

    from gr.data.outputs import output_files
    from gr.progress import default_progress
    from gr.train import rank as library
    from gr.train.job import running
    from gr.train.runs import config_of, open_run

    output_files({"--requests": options.requests}, {"--out": options.out})
    with running(config_of(options.run, options.data_path)) as processes:
        run = open_run(options.run, options.checkpoint, processes, options.data_path)
        total = library.check_requests(run, options.requests)
        with default_progress().stage("ranking", total, "candidates") as stage:
            done = library.rank(
                run,
                options.requests,
                options.out,
                unknown=options.unknown,
                at_once=options.at_once,
                advance=stage.advance,
            )
    print(
        f"wrote {done.candidates:,} candidates of {done.requests:,} requests to {options.out} (step {run.step:,} of "
        f"{options.run})"
    )
    if done.without_history:
        print(f"{done.without_history:,} requests are of users who did nothing before them")
    if done.unknown_users or done.unknown_items:
        print(
            f"no scores for {done.unknown_users:,} requests of users, and {done.unknown_items:,} candidates, that the "
            "dataset doesn't have"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
