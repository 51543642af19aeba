"""Columns of a log as they come -> the types that preparing works on, bad rows marked instead of raised.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.schema import TICKS_PER_SECOND

# text that ends in an offset from UTC: 2024-01-31T12:30:00Z, 2024-01-31 12:30:00.25+02:00
WITH_OFFSET = r":\d{2}(\.\d+)?(Z|[+-]\d{2}(:?\d{2})?)$"
YEAR_2200 = 7_258_118_400


@dataclass(frozen=True)
class Converted:
    """``values`` (n; anything where bad) and ``bad`` (n, bool) or None; ``problem`` says what is wrong with a bad
    value, ``fix`` what to do about it."""

    values: pa.Array
    bad: np.ndarray | None
    problem: str
    fix: str = ""


def plain(column: pa.Array) -> pa.Array:
    """Without dictionary encoding."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


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
    """Ids as int64 or string.  ``fix``: what to do about text among integers."""
    values, bad = _from_text(column, pa.int64()) if integer else _from_text(_id_text(column), pa.string())
    bad = _with_nulls(values, bad)
    wanted = "an integer id" if integer else "an id in UTF-8"
    return Converted(values, bad, f"is not {wanted}", fix if integer else "")


def to_ticks(column: pa.Array, unit: str, fractions: bool) -> Converted:
    """Times as int64 ticks of ``unit`` (one of TICKS_PER_SECOND) since 1970 UTC.

    Timestamps without a zone are taken as UTC.  ``fractions``: numbers are seconds with decimals, in ticks of us.
    """
    kind = column.type
    per_second = TICKS_PER_SECOND[unit]
    bad: np.ndarray | None
    late_in, fix = f" in time_unit '{unit}'", "" if unit == "iso" else "check time_unit"
    late_fix = "set time_unit to the log's own"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        resolution = pa.timestamp("us" if unit == "iso" else unit, getattr(kind, "tz", None))
        if pa.types.is_date(kind):
            column = column.cast(pa.timestamp("s"), safe=False)
        ticks, bad = cast_rows(column, resolution)  # never to a coarser one: what fails is out of its range
        ticks = ticks.cast(pa.int64())
        problem = "is not a time from 1678 to 2200"
        late_in, fix, late_fix = "", "", ""
    elif unit == "iso":
        ticks, bad = _parse_iso(column)
        problem = "is not a time like 2024-01-31T12:30:00"
    elif fractions:
        seconds, bad = _from_text(column, pa.float64())
        finite = pc.is_finite(seconds)
        scaled = pc.round(pc.multiply(pc.if_else(finite, seconds, None), 1e6))
        ticks, out_of_range = cast_rows(scaled, pa.int64())
        bad = _either(_with_nulls(ticks, bad), out_of_range)
        problem = "is not a time in seconds"
    else:
        ticks, bad = _from_text(column, pa.int64())
        problem = f"is not a whole number of time_unit '{unit}'"
    bad = _with_nulls(ticks, bad)
    if bad is None and len(ticks) and pc.max(ticks).as_py() < YEAR_2200 * per_second:
        return Converted(ticks, None, problem)
    late = pc.fill_null(pc.greater_equal(ticks, YEAR_2200 * per_second), False).to_numpy(zero_copy_only=False)
    if bad is None and late.any():
        return Converted(ticks, late, f"is after the year 2200{late_in}", late_fix)
    return Converted(ticks, _either(bad, late), problem, fix)


def to_numbers(column: pa.Array) -> Converted:
    """Values as float32, rounded; a missing one is NaN."""
    values, bad = _from_text(_as_float(column), pa.float32())
    return Converted(pc.fill_null(values, float("nan")), bad, "is not a number")


def field_type(kinds: list[pa.DataType]) -> str:
    """integer, float or string: what the column holds in every file."""
    if kinds and all(map(pa.types.is_integer, kinds)):
        return "integer"
    return "float" if kinds and all(map(is_number, kinds)) else "string"


def to_field(column: pa.Array, kind: str) -> Converted:
    """An extra column as int64 (``kind`` integer), float64 (float; missing: NaN) or string (missing: empty)."""
    column = _as_float(column) if kind == "float" else column
    values, bad = _from_text(
        column, {"integer": pa.int64(), "float": pa.float64(), "string": pa.string()}[kind]
    )
    if kind == "integer":
        return Converted(
            values, _with_nulls(values, bad), "is not an integer", "set the field's type: float or string"
        )
    return Converted(pc.fill_null(values, float("nan") if kind == "float" else ""), bad, f"is not a {kind}")


def _as_float(column: pa.Array) -> pa.Array:
    """Integers as float64, the large ones rounded (a checked cast refuses them)."""
    column = plain(column)
    return column.cast(pa.float64(), safe=False) if pa.types.is_integer(column.type) else column


def _id_text(column: pa.Array) -> pa.Array:
    """Floats that are to become text, as the integers that they nearly always are: pandas makes floats of integers
    where one is missing (NaN).  2.0 is '2', as in a file without a missing one."""
    column = plain(column)
    if not pa.types.is_floating(column.type):
        return column
    column = pc.if_else(pc.is_nan(column), None, column)
    whole = pc.and_(pc.equal(column, pc.round(column)), pc.less(pc.abs(column), 2.0**63))
    integers = pc.if_else(whole, column, None).cast(pa.int64()).cast(pa.string())
    return pc.coalesce(integers, column.cast(pa.string()))


def _from_text(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Cast of numbers or text (CSV columns come as bytes, so that one that is not UTF-8 spoils only its row)."""
    column, bad = plain(column), None
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column, bad = cast_rows(column, pa.string())
    if column.type == kind:
        return column, bad
    values, failed = cast_rows(column, kind)
    return values, _either(bad, failed)


def _parse_iso(column: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    text, bad = _from_text(column, pa.string())
    zoned = pc.fill_null(pc.match_substring_regex(text, WITH_OFFSET), False)
    ticks, failed = cast_rows(pc.if_else(zoned, None, text), pa.timestamp("us"))
    bad = _either(bad, failed)
    if pc.any(zoned).as_py():
        shifted, failed = cast_rows(pc.if_else(zoned, text, None), pa.timestamp("us", "UTC"))
        ticks = pc.if_else(zoned, shifted.cast(pa.int64()), ticks.cast(pa.int64()))
        bad = _either(bad, failed)
    return ticks.cast(pa.int64()), bad


def _with_nulls(values: pa.Array, bad: np.ndarray | None) -> np.ndarray | None:
    if values.null_count == 0:
        return bad
    return _either(bad, values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False))


def _either(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a | b
