"""Rebuild a published table: prepare, train every row, print published beside measured.

    python -m gr reproduce ml-1m --source DIR
    python -m gr reproduce ml-1m --source DIR --rows hstu,sasrec --seeds 1,2,3
    python -m gr reproduce synthetic-dp --processes 2
    python -m gr reproduce ml-1m-ctr --source DIR --seeds 1,2,3
    python -m gr reproduce adapters --source DIR --rows ml-1m-to-beauty,full,houlsby --seeds 1,2

Run the same command again after an interruption: what is finished stays, what isn't goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gr.errors import program
from gr.programs._arguments import names, new_parser
from gr.shipped import table_names


@program
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("dataset", help=f"one of {', '.join(table_names())}")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="changes to every row's config")
    parser.add_argument("--source", help="folder or URL of the raw files (generated datasets need none)")
    parser.add_argument("--data", help="where the prepared dataset is or goes (default: data/DATASET)")
    parser.add_argument("--out", default="runs/reproduce", help="where the runs go (default: %(default)s)")
    rows = "configs to train, comma-separated (default: all); of adapters directions, methods and parts"
    parser.add_argument("--rows", default="", help=rows)
    parser.add_argument(
        "--seeds", type=_seeds, default=[1], metavar="1,2", help="comma-separated (default: 1)"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes a run (default: %(default)s)")
    parser.add_argument(
        "--no-selection", action="store_true", help="skip the runs that choose an epoch by validation"
    )
    options = parser.parse_intermixed_args(arguments)

    from gr.train.reproduction.hypotheses import print_hypotheses, to_json
    from gr.train.reproduction.reproduce import reproduce
    from gr.train.reproduction.table import hypotheses_of, read_table
    from gr.train.reproduction.transfer import read_transfer
    from gr.train.reproduction.views import print_table, save_table

    if (table := read_transfer(options.dataset)) is not None:
        _transfer(table, options)
        return 0
    measured = reproduce(
        options.dataset,
        options.source,
        rows=names(options.rows),
        seeds=options.seeds,
        processes=options.processes,
        out=options.out,
        data=options.data,
        selection=not options.no_selection,
        overrides=options.overrides,
    )
    published = read_table(options.dataset)
    folder = Path(options.out, options.dataset)
    print_table(published, measured)
    if hypotheses := hypotheses_of(published, measured):
        print_hypotheses(hypotheses)
        (folder / "hypotheses.json").write_text(json.dumps(to_json(hypotheses), indent=1) + "\n")
    print(f"picture {save_table(published, measured, folder)}, table.json beside it")
    return 0


def _transfer(table: Any, options: argparse.Namespace) -> None:
    from gr.train.reproduction.hypotheses import print_hypotheses
    from gr.train.reproduction.transfer import hypotheses_of, print_transfer, save_transfer, transfer

    found = transfer(
        table,
        options.source,
        rows=names(options.rows),
        seeds=options.seeds,
        processes=options.processes,
        out=options.out,
        data=options.data,
        overrides=options.overrides,
    )
    hypotheses = hypotheses_of(found, table)
    print_transfer(found, table)
    print_hypotheses(hypotheses)
    print(f"kept in {save_transfer(found, hypotheses, f'{options.out}/{table.name}')}")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list like 1,2,3") from None


if __name__ == "__main__":
    sys.exit(main())
