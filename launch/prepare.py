"""Make a sequence dataset from an action log or a published data set.

python launch/prepare.py ml-1m --source DIR_OR_URL --out data/ml-1m
python launch/prepare.py log --source 'logs/*.parquet' --schema schema.yaml --out data/mine
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gr import registry
from gr.config import read_yaml
from gr.data.dataset import SequenceDataset
from gr.data.progress import default_progress
from gr.data.sources.base import make_source
from gr.errors import program


def report(dataset: SequenceDataset, seconds: float) -> None:
    """What each stage left, what was put aside, and the dataset's identity."""
    manifest, console = dataset.manifest, Console()
    table = Table("stage", title=escape(f"{manifest.name} -> {dataset.path}"), title_justify="left")
    for column in ("actions", "users", "items"):
        table.add_column(column, justify="right")
    for stage in manifest.provenance.get("stages", []):
        counts = (stage[c] for c in ("actions", "users", "items"))
        table.add_row(stage["stage"], *("" if n is None else f"{n:,}" for n in counts))
    console.print(table)
    if reasons := manifest.provenance.get("quarantined"):
        table = Table(
            "quarantined because", title=escape(str(dataset.path / "quarantine")), title_justify="left"
        )
        table.add_column("rows", justify="right")
        for reason, count in reasons.items():
            table.add_row(escape(reason), f"{count:,}")
        console.print(table)
    console.print(
        f"{manifest.users:,} users, {manifest.items:,} items, {manifest.actions:,} actions in {seconds:.1f} s; "
        f"fingerprint {manifest.fingerprint}",
        highlight=False,
        soft_wrap=True,
    )


@program
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=", ".join(registry.DATASETS))
    parser.add_argument("--source", help="file, glob, folder or URL to read")
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--schema", help="YAML: the log's columns and the policies")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="set an option"
    )
    args = parser.parse_args(arguments)
    given = read_yaml(args.schema) if args.schema else {}
    start = time.monotonic()
    source = make_source(args.name, given, args.set)
    dataset = source.prepare(args.source, args.out, overwrite=args.overwrite, progress=default_progress())
    report(dataset, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
