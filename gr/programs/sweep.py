"""Train a family of models at several computes, fit the law that they follow, and report it.

    python -m gr sweep --config scaling/small --out runs/small
    python -m gr sweep --config my-sweep.yaml --out runs/mine --workers 4 train.seed=2
    python -m gr sweep --config my-sweep.yaml --out runs/mine --workers 32 --backend slurm --gpus 1 --sbatch=--time=60

Run the same command again after an interruption: what is finished stays, what isn't goes on.
"""

from __future__ import annotations

import shlex
import sys

from gr.errors import UserError, program
from gr.programs._arguments import new_parser, refuse_torchrun
from gr.train.sweep.backends.base import BACKENDS, Resources


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
    parser.add_argument(
        "--backend", choices=BACKENDS, default="local", help="where members are trained (default: local)"
    )
    parser.add_argument(
        "--cpus", type=int, default=1, metavar="N", help="cores of a member, of slurm and ray (default: 1)"
    )
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of a member (default: 0)")
    parser.add_argument(
        "--sbatch",
        default="",
        metavar="WORDS",
        help="slurm: more for sbatch, as --sbatch='-p gpu -t 60'",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="ray: a cluster that runs, auto or HOST:PORT (default: start one here)",
    )
    options = parser.parse_intermixed_args(arguments)
    refuse_torchrun(
        "sweep, which starts its members' processes,", "and with --workers N for several at a time"
    )

    for name, least in (("workers", 1), ("cpus", 1), ("gpus", 0)):
        if (count := getattr(options, name)) < least:
            raise UserError(f"--{name} is {count}: {least} is the least")
    try:
        words = tuple(shlex.split(options.sbatch))
    except ValueError as error:
        raise UserError(f"--sbatch '{options.sbatch}' can't be read ({error}): close its quotes") from None

    from gr.train.sweep.sweep import sweep

    resources = Resources(options.cpus, options.gpus, words, options.ray)
    done = sweep(options.config, options.out, options.workers, options.overrides, options.backend, resources)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
