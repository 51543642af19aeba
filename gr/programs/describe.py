"""Print what is in a sequence dataset: counts, lengths, popularity, times, samples, health.

python -m gr describe data/ml-1m --plot ml-1m.png
"""

from __future__ import annotations

import sys

from rich.console import Console

from gr.data import describe_tables as tables
from gr.data.dataset import SequenceDataset
from gr.data.describe import describe, figure_format, plot
from gr.errors import program
from gr.programs._arguments import new_parser, refuse_torchrun


@program
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dataset", help="folder or URL of a sequence dataset")
    parser.add_argument("--samples", type=int, default=3, help="users to show (default 3)")
    parser.add_argument("--actions", type=int, default=5, help="actions to show of each (default 5)")
    parser.add_argument(
        "--plot", metavar="FILE", help="save the distributions of lengths and popularity: .png, .svg, .pdf"
    )
    args = parser.parse_args(arguments)
    refuse_torchrun("describe", "it reads the dataset once")
    if args.plot:
        figure_format(args.plot)
    dataset = SequenceDataset(args.dataset)
    found = describe(dataset)
    console = Console()
    for table in (
        tables.counts_table(dataset, found),
        tables.lengths_table(dataset, found),
        tables.popularity_table(dataset, found),
    ):
        console.print(table)
    for table in tables.remarks_tables(dataset):
        console.print(table)
    if args.samples > 0:
        console.print(tables.samples_table(dataset, args.samples, args.actions))
    console.print(tables.health_table(dataset, found))
    if args.plot:
        plot(dataset, found, args.plot)
        console.print(f"figure: {args.plot}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
