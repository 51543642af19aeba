"""The programs of gr by name: ``python -m gr NAME ...``, or ``gr NAME ...`` where gr is installed."""

from __future__ import annotations

import ast
import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec

from gr import __version__, programs
from gr.errors import UserError, nearest, program


@program
def main() -> int:
    names = [m.name for m in pkgutil.iter_modules(programs.__path__) if not m.name.startswith("_")]
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: gr PROGRAM [arguments]\n")
        print(*(f"  {name:<12}{_first_line(name)}" for name in names), sep="\n")
        print("\n`gr PROGRAM --help` has the arguments; `python -m gr` is the same as `gr`.")
        return 0
    name, *arguments = sys.argv[1:]
    if name == "--version":
        print(__version__)
        return 0
    if name not in names:
        raise UserError(f"gr has no program '{name}': {nearest(name, names)}", everywhere=True)
    sys.argv[:] = [f"gr {name}", *arguments]  # what its usage line and the run's record of the command show
    return import_module(f"gr.programs.{name}").main()


def _first_line(name: str) -> str:
    """What a program says of itself, read without importing all that it needs."""
    spec = find_spec(f"gr.programs.{name}")
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as source:
        return (ast.get_docstring(ast.parse(source.read())) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
