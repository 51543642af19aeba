"""What the programs have in common on the command line."""

from __future__ import annotations

import argparse

from gr.errors import UserError
from gr.launcher import launched


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows ``text``, a program's docstring, as it is written."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def refuse_torchrun(name: str, instead: str) -> None:
    """Refuse to be one of several processes: of a program that works in one, or starts its own."""
    if launched().ranks > 1:
        raise UserError(f"{name} is one process: start it without torchrun, {instead}", everywhere=True)


def names(text: str) -> list[str]:
    """``a,b`` -> ``['a', 'b']``; an empty text has none."""
    return [name for name in text.split(",") if name]


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN by position or as --run, and --checkpoint."""
    parser.add_argument(
        "folder", nargs="?", metavar="RUN", help="the folder or URL of a run, or of an export"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="the same as RUN (which torchrun would take for an option of its own)"
    )
    parser.add_argument(
        "--checkpoint", default="last", help="last (default), best (on valid) or a step number"
    )


def add_data_path(parser: argparse.ArgumentParser) -> None:
    """--data-path, for a run whose dataset has moved."""
    parser.add_argument(
        "--data-path", metavar="PATH", help="where the dataset is (default: the run's data.path)"
    )


def add_dim(parser: argparse.ArgumentParser) -> None:
    """--dim, for a run that trained vectors to be cut."""
    cut = "use the first N numbers of vectors (of a run with model.similarity.matryoshka; default: all)"
    parser.add_argument("--dim", type=int, metavar="N", help=cut)


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
