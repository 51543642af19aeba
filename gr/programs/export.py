"""Take a model out of its run: a folder of safetensors, config and item ids that evaluate and recommend take as a run.

python -m gr export --run runs/NAME --out exported
python -m gr export --run runs/NAME --out exported --checkpoint best data.path=/mnt/data/shop model.table=mapped
"""

from __future__ import annotations

import argparse
import sys

from gr.errors import program
from gr.programs._arguments import add_run, new_parser, refuse_torchrun, settle_run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run(parser)
    changes = "changes to the config: where the data is, which table, device, threads and kernels, eval.*"
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help=changes)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    options = parser.parse_intermixed_args(arguments)
    settle_run(parser, options)
    return options


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    refuse_torchrun("export", "it reads a checkpoint of any number of processes")

    from gr.progress import default_progress
    from gr.train.exporting import export, summary

    progress = default_progress()
    done = export(options.run, options.out, options.checkpoint, options.overrides, progress=progress)
    print("\n".join(summary(done, options.run, options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
