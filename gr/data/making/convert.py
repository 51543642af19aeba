"""Columns of a log as they come -> the types that preparing works on, bad rows marked instead of raised.

What would become another value on the way (text that reads as an integer but is not written as one, integers that a
float cannot tell from their neighbours) is bad; an empty text is missing, in Parquet as in CSV.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING = "missing"
"""Instead of a description: there is no value."""

MANTISSA = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}
"""A float of 2^bits or more stands for several integers."""


@dataclass(frozen=True)
class Problem:
    """``rows`` (n, bool) that are bad; ``what`` is wrong with their value, as the end of a sentence that begins with
    it, or MISSING; ``fix``: what to do about it."""

    rows: np.ndarray
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Converted:
    """``values`` (n; null where bad) and what is wrong with the bad ones; of several problems of a row the first
    counts."""

    values: pa.Array
    problems: tuple[Problem, ...] = ()

    @property
    def bad(self) -> np.ndarray | None:
        """(n, bool), or None if no row is bad."""
        return reduce(np.logical_or, (p.rows for p in self.problems)) if self.problems else None

    def problem(self, row: int) -> Problem:
        return next(p for p in self.problems if p.rows[row])


def plain(column: pa.Array) -> pa.Array:
    """Without dictionary encoding, and decimals in the width for which there are all operations."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        column = column.cast(pa.decimal128(kind.precision, kind.scale))
    return column


def as_bytes(text: pa.Array) -> pa.Array:
    """Text as the bytes that it is."""
    return text.cast(pa.large_binary() if pa.types.is_large_string(text.type) else pa.binary())


def is_utf8(text: pa.Array) -> bool:
    """Whether all of a column of strings is UTF-8: what is read from Parquet need not be."""
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Of the values, where they are dictionary-encoded."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's values are text: strings, or bytes, as columns of CSV come."""
    kind = plain_type(kind)
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Whether they are integers, floats or decimals: no booleans, no times."""
    kind = plain_type(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def can_be_ids(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold ids: numbers or text.  A date, a time or a boolean is neither, though
    Arrow has a number for each."""
    return is_text(kind) or is_number(kind)


def cast_rows(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """``column`` as ``kind`` and the rows that cannot be (n, bool; None if all can); those are null.

    Arrow's cast is all or nothing: where it fails, the halves are tried.  So a value is good or bad by itself,
    whatever its chunk.
    """
    try:
        return column.cast(kind), None
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, kind), np.ones(1, dtype=bool)
    half = len(column) // 2
    (left, left_bad), (right, right_bad) = cast_rows(column[:half], kind), cast_rows(column[half:], kind)
    bad = np.zeros(len(column), dtype=bool)
    bad[:half] = False if left_bad is None else left_bad
    bad[half:] = False if right_bad is None else right_bad
    return pa.concat_arrays([left, right]), bad


def to_ids(column: pa.Array, integer: bool, fix: str) -> Converted:
    """Ids as int64 or string; empty ones are missing.  ``fix``: what to do about text among integers."""
    if integer and (written := as_written(column)) is not None:
        return checked(written, [])
    column, problems = readable(
        column, "is not an integer id" if integer else "is not an id in UTF-8", fix if integer else ""
    )
    exact, inexact = exact_integers(column)
    problems += inexact
    if not integer:
        return checked(_as_text(exact), problems)
    values, bad = cast_rows(exact, pa.int64())
    large = pa.types.is_unsigned_integer(exact.type)
    problems += some(bad, "is larger than any integer id, 2^63 - 1" if large else "is not an integer id", fix)
    if is_text(column.type):
        problems += some(_zero_first(column), "would become another id as an integer", fix)
    return checked(values, problems)


def as_written(column: pa.Array) -> pa.Array | None:
    """A column of text as int64 if all of it are integers as they are written; None sends it the long way."""
    if not is_text(column.type) or pa.types.is_dictionary(column.type):
        return None
    try:
        values = column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return None if pc.any(_zero_first(column)).as_py() else values


def to_numbers(column: pa.Array) -> tuple[Converted, int]:
    """Values as float32, rounded; a missing one is NaN; true and false are 1 and 0.  And how many integers became
    another one by it."""
    column, problems = readable(column, "is not a number")
    values, bad = _numbers(column, pa.float32())
    problems += some(bad, "is not a number")
    problems += some(pc.is_inf(values), "is not a finite number of 32 bits")
    rounded = 0
    if pa.types.is_integer(column.type) and column.type.bit_width > 16:
        same = pc.equal(values.cast(column.type, safe=False), column)
        rounded = len(column) - int(pc.sum(pc.fill_null(same, True)).as_py() or 0)
    return Converted(pc.fill_null(values, float("nan")), tuple(problems)), rounded


def field_type(kinds: list[pa.DataType]) -> str:
    """integer, float or string: what the column holds in every file.  Decimals of more digits than a float has stay
    text."""

    def whole(kind: pa.DataType) -> bool:
        return pa.types.is_integer(kind) or (
            pa.types.is_decimal(kind) and kind.scale == 0 and kind.precision < 19
        )

    if kinds and all(map(whole, kinds)):
        return "integer"
    exact = all(is_number(k) and not (pa.types.is_decimal(k) and k.precision > 15) for k in kinds)
    return "float" if kinds and exact else "string"


def to_field(column: pa.Array, kind: str, asked: bool = True) -> Converted:
    """An extra column as int64 (``kind`` integer), float64 (float; missing: NaN) or string (missing: empty).

    ``asked``: the schema says the type: integers may lose digits in a float, 08 is 8.  Else nothing may."""
    problem = "is not an integer" if kind == "integer" else f"is not a {kind}"
    fix = "set the field's type: float or string" if kind == "integer" else ""
    column, problems = readable(column, problem, fix)
    if kind == "float":
        values, bad = _numbers(column, pa.float64())
        problems += some(bad, problem)
        if not asked and pa.types.is_integer(column.type):
            problems += _large(pc.abs(column.cast(pa.float64(), safe=False)), 53)
        return Converted(pc.fill_null(values, float("nan")), tuple(problems))
    if kind == "string" and asked:
        return Converted(pc.fill_null(_as_text(column), ""), tuple(problems))
    exact, inexact = exact_integers(column)
    problems += inexact
    if kind == "string":
        return Converted(pc.fill_null(_as_text(exact), ""), tuple(problems))
    if is_text(column.type):
        if asked:
            problems += some(pc.match_substring_regex(column, "^-?0[xX]"), problem, fix)
        else:
            problems += some(_zero_first(column), "would become another value as an integer", fix)
    values, bad = _numbers(exact, pa.int64())
    return checked(values, problems + some(bad, problem, fix))


def readable(column: pa.Array, problem: str, fix: str = "") -> tuple[pa.Array, list[Problem]]:
    """Without dictionary encoding, text as strings (CSV columns come as bytes, so that one that is not UTF-8 spoils
    only its row), empty or blank text as null."""
    column, problems = plain(column), []
    if is_text(column.type):
        if column.type != pa.string() or not is_utf8(column):
            column, bad = cast_rows(as_bytes(column), pa.string())
            problems = some(bad, problem, fix)
        blank = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
        if pc.any(blank).as_py():
            column = pc.if_else(blank, None, column)
    elif pa.types.is_floating(column.type) and len(column):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column, problems


def some(rows: pa.Array | np.ndarray | None, what: str, fix: str = "") -> list[Problem]:
    """The problem of these rows (bool, nulls are none), if there are any."""
    if rows is None:
        return []
    if not isinstance(rows, np.ndarray):
        if not pc.any(rows).as_py():
            return []
        rows = pc.fill_null(rows, False).to_numpy(zero_copy_only=False)
    return [Problem(rows, what, fix)] if rows.any() else []


def checked(values: pa.Array, problems: list[Problem]) -> Converted:
    """The values, of which none may be missing."""
    if values.null_count:
        absent = values.is_null().to_numpy(zero_copy_only=False)
        for problem in problems:
            absent &= ~problem.rows
        problems = problems + some(absent, MISSING)
    bad = Converted(values, tuple(problems)).bad
    return Converted(values if bad is None else pc.if_else(pa.array(bad), None, values), tuple(problems))


def exact_integers(column: pa.Array) -> tuple[pa.Array, list[Problem]]:
    """Floats that are to become integers or ids, as the integers that they nearly always are: pandas makes floats of
    integers where one is missing.  2.0 is 2; what is too large to be told from its neighbours is bad."""
    if pa.types.is_boolean(column.type) or not pa.types.is_floating(column.type):
        return column, []
    kind = column.type
    if kind == pa.float16():  # which has few operations
        column = column.cast(pa.float32())
    problems = _large(pc.abs(column), MANTISSA[kind], f"is a float{kind.bit_width}")
    if problems:
        column = pc.if_else(pa.array(problems[0].rows), None, column)
    return column, problems


def _large(size: pa.Array, bits: int, what: str = "becomes a float64") -> list[Problem]:
    rows = pc.greater_equal(size, 2.0**bits)
    problem = f"{what} of 2^{bits} or more, where neighbouring integers are one number"
    return some(rows, problem, "write the column as integers or text")


def _as_text(column: pa.Array) -> pa.Array:
    """Text of whole numbers without decimals, so that 2.0 and 2 are one id."""
    if not (pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        return column.cast(pa.string())
    whole = pc.equal(column, pc.round(column))
    integers, _ = cast_rows(pc.if_else(whole, column, None), pa.int64())
    return pc.coalesce(integers.cast(pa.string()), column.cast(pa.string()))


def _numbers(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Cast to a number type: large integers are rounded (a checked cast refuses them), true and false are 1 and 0, in
    text too."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_floating(kind) and pa.types.is_integer(column.type):
        column = column.cast(pa.float64(), safe=False)
    values, bad = cast_rows(column, kind)
    if bad is not None and pa.types.is_string(column.type):
        word = pc.utf8_lower(column)
        truth = pc.case_when(
            pc.make_struct(pc.equal(word, "true"), pc.equal(word, "false")),
            pa.scalar(1, kind),
            pa.scalar(0, kind),
        )
        values = pc.coalesce(values, truth)
        bad = bad & values.is_null().to_numpy(zero_copy_only=False)
    return values, bad


def _zero_first(text: pa.Array) -> pa.Array:
    """Where digits come after a zero, and -0: 0x1F and 007, which a cast takes for 31 and 7."""
    zero, minus = pc.starts_with(text, "0"), pc.starts_with(text, "-0")
    if not pc.any(zero).as_py():
        return minus
    return pc.or_(minus, pc.and_(zero, pc.greater(pc.binary_length(text), 1)))
