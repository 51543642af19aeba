"""Train a config, or go on with a run.

python -m gr train --config configs/quickstart.yaml
torchrun --standalone --nproc-per-node 2 -m gr.programs.train --config ml-1m/hstu train.epochs=3
torchrun --standalone --nproc-per-node 2 -m gr.programs.train --resume runs/NAME
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext

from gr import config as configs
from gr.errors import UserError, program
from gr.launcher import end_with_agent, launched
from gr.programs._arguments import new_parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", metavar="FILE", help="a config to train in a new folder, or the name of one that ships"
    )
    what.add_argument("--resume", metavar="RUN", help="a run's folder to go on with")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="changes to the config")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, take one step, report, leave"
    )
    parser.add_argument(
        "--plan-for", type=int, metavar="N", help="print how tables would be cut for N processes, leave"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a torch profiler trace of steps 6 to 11"
    )
    return parser.parse_intermixed_args(arguments)


@program
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end_with_agent()
    main_rank = launched().rank == 0
    try:
        config = _config(options)
    except UserError as error:
        error.everywhere = True  # every process reads the same file
        raise
    if options.print_config:
        if main_rank:
            configs.warn_of_idle_keys(config)
            print(configs.to_yaml(config), end="")
        return 0

    from gr.train import dry_run, job, profiling
    from gr.train.report import print_result

    if options.plan_for:
        dry_run.plan_only(config, options.plan_for)
        return 0
    if options.dry_run:
        dry_run.dry_run(config)
        return 0
    with profiling.trace() if options.profile else nullcontext(job.nothing) as on_step:
        if options.resume:
            result = job.resume(options.resume, options.overrides, on_step=on_step)
        else:
            result = job.run(config, on_step=on_step)
    if main_rank:
        print_result(result)
    return 0


def _config(options: argparse.Namespace) -> configs.RunConfig:
    if not options.resume:
        return configs.load(options.config, options.overrides)

    from gr.train.job import saved_run  # brings torch: a config alone is read without

    return saved_run(options.resume, options.overrides)[1]


if __name__ == "__main__":
    sys.exit(main())
