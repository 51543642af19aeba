"""Train a config, or go on with a run.

python launch/train.py --config configs/quickstart.yaml
torchrun --standalone --nproc-per-node 2 launch/train.py --config configs/ml-1m/hstu.yaml train.epochs=3
torchrun --standalone --nproc-per-node 2 launch/train.py --resume runs/NAME
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

from gr import config as configs
from gr.errors import UserError, program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="a config to train in a new folder")
    what.add_argument("--resume", metavar="RUN", help="a run's folder to go on with")
    parser.add_argument("overrides", nargs="*", metavar="key.key=value", help="changes to the config")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, take one step, report, leave"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a torch profiler trace of steps 6 to 11"
    )
    return parser.parse_intermixed_args()


@program
def main() -> int:
    options = arguments()
    main_rank = os.environ.get("RANK", "0") == "0"
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
    raise SystemExit(main())
