"""Write the best items of each user, by a trained run, to a Parquet file.

python -m gr recommend --run runs/NAME --users all --k 100 --out recs.parquet
python -m gr recommend --run runs/NAME --users ids.txt --out recs.parquet --user-vectors users.parquet
"""

from __future__ import annotations

import argparse
import sys

from gr import config as configs
from gr.errors import UserError, program
from gr.programs._arguments import add_run, new_parser, refuse_torchrun, settle_run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run(parser)
    parser.add_argument(
        "--users",
        required=True,
        metavar="FILE|all",
        help="ids: text, one a line, or Parquet or CSV with user_id",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet: user_id, item_ids, scores")
    parser.add_argument("--k", type=int, default=100, help="items a user (default 100)")
    excluded = "history items left out: none, those the model is shown, all (default: the run's eval.exclude)"
    parser.add_argument("--exclude", choices=["none", "kept", "all"], help=excluded)
    parser.add_argument(
        "--time", type=int, metavar="SECONDS", help="time of the request (default: the user's last)"
    )
    parser.add_argument("--user-vectors", metavar="FILE", help="write user_id, vector there")
    parser.add_argument("--item-vectors", metavar="FILE", help="write item_id, vector there")
    options = parser.parse_args(arguments)
    settle_run(parser, options)
    if options.k < 1:
        raise UserError(f"--k is {options.k}: ask for one item at least")
    return options


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_torchrun("recommend", "with a part of the users each if one isn't enough")

    from gr.data.making.files import output_files
    from gr.progress import default_progress
    from gr.train.folder import RunFolder
    from gr.train.job import running
    from gr.train.recommend import read_user_ids, recommend, write_item_vectors
    from gr.train.runs import open_run

    names = ("users", "out", "user_vectors", "item_vectors")
    output_files({f"--{name.replace('_', '-')}": getattr(options, name) for name in names})
    users = None if options.users == "all" else list(dict.fromkeys(read_user_ids(options.users)))
    config = configs.load(RunFolder.existing(options.run).config)
    with running(config) as processes:
        run = open_run(options.run, options.checkpoint, processes)
        total = run.data.dataset.users if users is None else len(users)
        with default_progress().stage("recommending", total, "users") as stage:
            wanted = {name: getattr(options, name) for name in ("k", "exclude", "time", "user_vectors")}
            count = recommend(run, options.out, users=users, advance=stage.advance, **wanted)
        if options.item_vectors:
            write_item_vectors(run, options.item_vectors)
    print(f"wrote {count:,} users to {options.out} (step {run.step:,} of {options.run})")
    if vectors := [file for file in (options.user_vectors, options.item_vectors) if file]:
        print(f"wrote {' and '.join(vectors)}: inner products of user and item vectors are the scores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
