"""Make a sequence dataset from an action log or a published data set.

python -m gr prepare ml-1m --source DIR_OR_URL --out data/ml-1m
python -m gr prepare log --source 'logs/*.parquet' --schema schema.yaml --out data/mine
python -m gr prepare log --source s3://logs --schema schema.yaml --out /shared/mine --engine ray --address auto
python -m gr prepare ray --dataset mine.logs:actions --schema schema.yaml --out data/mine
python -m gr prepare append --to data/mine --source 'logs/dt=2024-05-02/*'
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from gr import registry
from gr.data.describe_tables import preparation_tables
from gr.data.making.engine import Engine
from gr.data.making.sources.base import make_source
from gr.data.making.sources.log import ActionLog
from gr.data.outputs import output_folder
from gr.data.stores import is_url
from gr.errors import UserError, program
from gr.programs._arguments import new_parser, refuse_torchrun
from gr.progress import default_progress


@program
def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    refuse_torchrun("prepare", "its result doesn't depend on how many read it")
    _check(args)
    start, progress = time.monotonic(), default_progress()
    if args.name == "append":
        dataset = ActionLog.append(
            args.source, args.to, schema=args.schema, settings=args.set, progress=progress
        )
    else:
        dataset = make_source(args.name, args.schema or {}, args.set).prepare(
            args.dataset or args.source,
            args.out,
            overwrite=args.overwrite,
            progress=progress,
            engine=Engine(args.engine, args.address, args.tasks),
        )
    seconds = time.monotonic() - start
    for table in preparation_tables(dataset):
        Console().print(table)
    print(f"{dataset.manifest.counts} in {seconds:.1f} s; fingerprint {dataset.manifest.fingerprint}")
    print(f"next  python -m gr describe {dataset.path}")


def _parser() -> ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("name", help=f"{', '.join(registry.DATASETS)}; or append, for newer actions of a log")
    parser.add_argument("--source", help="file, glob (in quotes), folder or URL to read")
    parser.add_argument("--dataset", metavar="MODULE:FUNCTION", help="for ray: gives a ray.data.Dataset")
    parser.add_argument("--out", help="folder or URL of the dataset")
    parser.add_argument("--to", help="with append: folder of the dataset that grows")
    parser.add_argument("--schema", help="YAML: the log's columns and the policies")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the schema or of the source, such as filter.min_length=3 (docs/your-own-data.md)",
    )
    parser.add_argument("--engine", choices=("process", "ray"), default="process", help="who does the work")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster, or auto; else one is started"
    )
    parser.add_argument("--tasks", type=int, metavar="N", help="at most N tasks at a time on the cluster")
    return parser


def _check(args: Namespace) -> None:
    """Refuse options that don't go together, before anything is read."""
    appending = args.name == "append"
    wanted, unwanted = ("to", "out") if appending else ("out", "to")
    if getattr(args, wanted) is None or getattr(args, unwanted) is not None:
        raise UserError(
            f"prepare {args.name} takes --{wanted}, and not --{unwanted}: give it the dataset's folder"
        )
    if appending and (args.source is None or args.overwrite):
        raise UserError(
            "prepare append reads the newer actions from --source, and never overwrites: give it that"
        )
    if appending and args.engine != "process":
        raise UserError("prepare append runs in one process: leave --engine out")
    if not appending and not is_url(args.out):
        output_folder(args.out)
    if args.schema and not Path(args.schema).exists():
        raise UserError(f"no schema file '{args.schema}': docs/your-own-data.md shows one")
    if args.tasks is not None and args.tasks < 1:
        raise UserError(f"--tasks is {args.tasks}: give a positive number")
    if args.dataset is not None and (args.name != "ray" or args.source is not None):
        raise UserError(
            "--dataset is the source of ray, and no other has one: python -m gr prepare ray --dataset ..."
        )


if __name__ == "__main__":
    sys.exit(main())
