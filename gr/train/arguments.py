"""What the programs that use a trained run have in common on the command line."""

from __future__ import annotations

import argparse


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN by position or as --run, and --checkpoint."""
    parser.add_argument("folder", nargs="?", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--run", metavar="RUN", help="the same as RUN (which torchrun would take for an option of its own)"
    )
    parser.add_argument(
        "--checkpoint", default="last", help="last (default), best (on valid) or a step number"
    )


def settle_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave the run in ``options.run``, whichever way it was given; what stands at RUN's place beside --run is the
    first of the overrides."""
    if options.run is not None and options.folder is not None:
        if "overrides" not in options:
            parser.error(f"--run {options.run} and {options.folder}: give one RUN")
        options.overrides.insert(0, options.folder)
    options.run = options.run or options.folder
    if options.run is None:
        parser.error("give a RUN: the folder of a trained run")
