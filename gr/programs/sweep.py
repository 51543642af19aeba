"""Train a family of models at several computes, fit the law that they follow, and report it.

    python -m gr sweep --config scaling/small --out runs/small
    python -m gr sweep --config my-sweep.yaml --out runs/mine --workers 4 train.seed=2

Run the same command again after an interruption: what is finished stays, what isn't goes on.
"""

from __future__ import annotations

import sys

from gr.errors import program
from gr.programs._arguments import new_parser, refuse_torchrun


@program
def main(arguments: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.key=value", help="changes to every member's config"
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a sweep, or the name of one that ships"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the members and the report go")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="members at a time (default: 1)")
    options = parser.parse_intermixed_args(arguments)
    refuse_torchrun(
        "sweep, which starts its members' processes,", "and with --workers N for several at a time"
    )

    from gr.train.sweep.sweep import sweep

    return 0 if sweep(options.config, options.out, options.workers, options.overrides) else 1


if __name__ == "__main__":
    sys.exit(main())
