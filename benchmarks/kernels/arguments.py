"""Arguments that several of these programs take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """An argparse type: a number above zero."""

    def parse(text: str) -> Number:
        try:
            number = kind(text)
        except ValueError:
            number = kind("0")
        if not number > 0:
            raise argparse.ArgumentTypeError(f"a number above zero is wanted, not {text!r}")
        return number

    return parse
