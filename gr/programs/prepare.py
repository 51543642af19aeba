"""Make a sequence dataset from an action log or a published data set.

python -m gr prepare ml-1m --source DIR_OR_URL --out data/ml-1m
python -m gr prepare log --source 'logs/*.parquet' --schema schema.yaml --out data/mine
python -m gr prepare append --to data/mine --source 'logs/dt=2024-05-02/*'
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from gr import registry
from gr.data.dataset import SequenceDataset
from gr.data.describe_tables import preparation_tables
from gr.data.making.files import output_folder
from gr.data.making.sources.base import make_source
from gr.data.making.sources.log import ActionLog
from gr.errors import UserError, program
from gr.programs._arguments import new_parser, refuse_torchrun
from gr.progress import default_progress


def report(dataset: SequenceDataset, seconds: float) -> None:
    """What each stage left, what was put aside, and the dataset's identity."""
    manifest, console = dataset.manifest, Console()
    for table in preparation_tables(dataset):
        console.print(table)
    print(
        f"{manifest.users:,} users, {manifest.items:,} items, {manifest.actions:,} actions in {seconds:.1f} s; "
        f"fingerprint {manifest.fingerprint}\n"
        f"next  python -m gr describe {dataset.path}"
    )


@program
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("name", help=f"{', '.join(registry.DATASETS)}; or append, for newer actions of a log")
    parser.add_argument("--source", help="file, glob (in quotes), folder or URL to read")
    parser.add_argument("--out", help="folder of the dataset")
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
    args = parser.parse_args(arguments)
    refuse_torchrun("prepare", "its result doesn't depend on how many read it")
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
    if not appending:
        output_folder(args.out)
    if args.schema and not Path(args.schema).exists():
        raise UserError(f"no schema file '{args.schema}': docs/your-own-data.md shows one")
    start = time.monotonic()
    progress = default_progress()
    if appending:
        dataset = ActionLog.append(
            args.source, args.to, schema=args.schema, settings=args.set, progress=progress
        )
    else:
        source = make_source(args.name, args.schema or {}, args.set)
        dataset = source.prepare(args.source, args.out, overwrite=args.overwrite, progress=progress)
    report(dataset, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
