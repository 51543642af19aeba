"""Write the best items of each user, by a trained run, to a Parquet file.

python -m gr recommend --run runs/NAME --users all --k 100 --out recs.parquet
python -m gr recommend --run runs/NAME --users ids.txt --out recs.parquet --user-vectors users.parquet
python -m gr recommend --run runs/NAME --users all --held-out test --out tested.parquet
python -m gr recommend --run runs/NAME --users all --new-items items.parquet --out recs.parquet
"""

from __future__ import annotations

import argparse
import sys

from gr.errors import UserError, program
from gr.programs._arguments import add_data_path, add_dim, add_run, new_parser, refuse_torchrun, settle_run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run(parser)
    add_data_path(parser)
    add_dim(parser)
    users = "ids: text, one a line, or Parquet or CSV with user_id"
    parser.add_argument("--users", required=True, metavar="FILE|all", help=users)
    unknown = (
        "users that the dataset doesn't have: list them beside OUT and serve the others (default), or refuse"
    )
    parser.add_argument("--unknown", choices=["list", "refuse"], default="list", help=unknown)
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet: user_id, item_ids, scores")
    parser.add_argument("--k", type=int, default=100, help="items a user (default 100)")
    excluded = "history items left out: none, those the model is shown, all (default: the run's eval.exclude)"
    parser.add_argument("--exclude", choices=["none", "kept", "all"], help=excluded)
    parser.add_argument(
        "--time", type=int, metavar="SECONDS", help="time of the request (default: the user's last)"
    )
    held_out = (
        "recommend as the evaluation of a split (test, valid) asks, without the held-out action, which goes to a column"
        " target_id: the run's metrics can be computed from OUT"
    )
    parser.add_argument("--held-out", metavar="SPLIT", help=held_out)
    parser.add_argument("--user-vectors", metavar="FILE", help="write user_id, vector there")
    of_items = "write item_id, vector there, of the catalogue's items and then of new ones"
    parser.add_argument("--item-vectors", metavar="FILE", help=of_items)
    new = "Parquet: item_id and what the run's item tower reads, of items that training never saw"
    parser.add_argument("--new-items", metavar="FILE", help=new)
    options = parser.parse_args(arguments)
    settle_run(parser, options)
    if options.k < 1:
        raise UserError(f"--k is {options.k}: ask for one item at least")
    return options


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_torchrun("recommend", "with a part of the users each if one isn't enough")

    from gr.data.outputs import output_files
    from gr.data.requests import find_users
    from gr.progress import default_progress
    from gr.train import recommend as library, user_files
    from gr.train.job import running
    from gr.train.runs import config_of, open_run

    read, written = (
        {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
        for names in (("users", "new_items"), ("out", "user_vectors", "item_vectors"))
    )
    if options.users != "all":
        written["the file of unknown users"] = str(user_files.unknown_users_file(options.out))
    output_files(read, written)
    ids = None if options.users == "all" else user_files.read_user_ids(options.users)
    config = config_of(options.run, options.data_path)
    with running(config) as processes:
        run = open_run(options.run, options.checkpoint, processes, options.data_path, options.dim)
        found = None if ids is None else find_users(run.data.dataset, ids)
        if found is not None and (options.unknown == "refuse" or not found.users):
            found.refuse_unknown()
        total = run.data.dataset.users if found is None else found.users
        new = None if options.new_items is None else library.unseen_items(run, options.new_items)
        with default_progress().stage("recommending", total, "users") as stage:
            asked = ("k", "exclude", "time", "held_out", "user_vectors")
            wanted = {name: getattr(options, name) for name in asked} | {"new_items": new}
            count = library.recommend(run, options.out, users=found, advance=stage.advance, **wanted)
        if options.item_vectors:
            library.write_item_vectors(run, options.item_vectors, new)
    cut = "" if options.dim is None else f", the first {options.dim} numbers of vectors"
    print(f"wrote {count:,} users to {options.out} (step {run.step:,} of {options.run}{cut})")
    if found is not None and (listed := user_files.write_unknown_users(found, options.out)):
        print(
            f"{len(found.unknown):,} users are not in the dataset '{found.dataset}': they are listed in {listed}"
        )
    if count < total:
        print(f"{total - count:,} users have no action that split '{options.held_out}' holds out")
    if vectors := [file for file in (options.user_vectors, options.item_vectors) if file]:
        print(f"wrote {' and '.join(vectors)}: inner products of user and item vectors are the scores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
