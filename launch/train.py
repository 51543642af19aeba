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
        "--profile", action="store_true", help="write a torch profiler trace of steps 5 to 10"
    )
    return parser.parse_intermixed_args()


@program
def main() -> int:
    options = arguments()
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = None if options.resume else configs.load(options.config, options.overrides)
    except UserError:
        if main_rank:
            raise
        return 2  # every rank reads the same file: one message is enough
    if options.print_config:
        if main_rank:
            print(configs.to_yaml(config or _saved(options)), end="")
        return 0

    from gr.train import dry_run, job, profiling
    from gr.train.report import print_result

    if options.dry_run:
        dry_run.dry_run(config or _saved(options))
        return 0
    with profiling.trace() if options.profile else nullcontext(profiling.no_trace) as on_step:
        if config is None:
            result = job.resume(options.resume, options.overrides, on_step=on_step)
        else:
            result = job.run(config, on_step=on_step)
    if main_rank:
        print_result(result)
    return 0


def _saved(options: argparse.Namespace) -> configs.RunConfig:
    from gr.train.folder import RunFolder

    return configs.load(RunFolder.existing(options.resume).config, options.overrides)


if __name__ == "__main__":
    raise SystemExit(main())
