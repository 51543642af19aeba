"""Doubts: what a log's columns look like, where that is probably not what the schema says they are.

A doubt is a sentence; the work goes on.  It is said before the work, from statistics of the files and a sample of
their rows, and kept in the manifest, from all rows.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.times import (
    EARLY,
    SENTINELS,
    Clock,
    FileTimes,
    dates_as_numbers,
    likely_unit,
    when,
)

Doubts = dict[str, str]
"""What is doubted (the same thing under the same name, whatever its numbers) -> the sentence."""

ENOUGH = 20
"""Distinct values of which half would be odd by chance: all even is one in a million."""
COUNTED = ("unit", "early")
"""Names of the doubts of times that are counted again when all rows are known; so are unknown ones."""
GRID = 64
"""A power of two in the steps of times; clocks tick in 1, 10, 60, 1000 or 3600 (with hours
and days 128 divides too)."""
WORDS_FOR_NOTHING = ("nan", "NaN", "None", "none", "null", "NULL", "<NA>", "N/A", "\\N")


def of_times(column: str, clock: Clock, files: dict[str, FileTimes], sampled: bool) -> Doubts:
    """Of the times of all files, seen whole or by a sample."""
    doubts: Doubts = {}
    per_second = clock.per_second
    later = [f.last for f in files.values() if f.last is not None and f.last >= EARLY * per_second]
    early = {
        n: (f.early, f.early_first, f.early_last)
        for n, f in files.items()
        if f.early_first is not None and f.early_last is not None
    }
    among = "sampled " if sampled else ""
    if early:
        rows = sum(e[0] for e in early.values())
        first, last = min(e[1] for e in early.values()), max(e[2] for e in early.values())
        span = f"{when(first // per_second)} to {when(last // per_second)}"
        where = f"'{next(iter(early))}'" + (f" and {len(early) - 1:,} more files" if len(early) > 1 else "")
        number = last // per_second if clock.fractions else last
        found = likely_unit(number, 1 if clock.fractions else per_second)
        read_as = f"time_unit '{clock.unit}'" if not clock.typed else f"timestamps in {clock.unit}"
        share = f"{rows:,} {among}times" if later else f"the {among}times"
        said = f"column '{column}': {share}, of {where}, lie from {span} by {read_as}"
        if found:
            remedy = (
                f"set time_unit: {found[0]}"
                if not clock.typed
                else f"write the column as integers with time_unit: {found[0]}"
            )
            doubts["unit"] = (
                f"{said}; the last would be {when(found[1])} in {found[0]}: {remedy} if that is it"
            )
        elif later:
            doubts["early"] = (
                f"{said}, the others until {when(max(later) // per_second)}: set earliest if they are no times of "
                "actions"
            )
    for sentinel in SENTINELS:
        count = sum(f.sentinels.get(sentinel, 0) for f in files.values())
        nothing_else = count > 1 and count == sum(f.rows for f in files.values())
        # a log whose clock starts at 0 has zeros of its own
        if count and (sentinel > 0 or later or "unit" in doubts or nothing_else):
            doubts[f"unknown {sentinel}"] = (
                f"column '{column}': {count:,} of the {among}times: {sentinel} ({when(sentinel)}), which often stands "
                f"for an unknown time: set unknown_times: [{sentinel}] to make them bad rows"
            )
    return doubts


def of_time_sample(column: str, clock: Clock, ticks: pa.Array) -> Doubts:
    """Of sampled times (int64 ticks, no nulls): dates written as numbers, the steps of a float."""
    values = np.unique(ticks.to_numpy(zero_copy_only=False))
    values = values[~np.isin(values, SENTINELS)]
    if clock.fractions and not (values % 10**6).any():
        values = values // 10**6
    if not len(values):
        return {}
    if not (clock.typed or clock.unit == "iso") and (text := dates_as_numbers(values)):
        return {
            "dates": f"column '{column}': {values[0]} and the other sampled times look like dates written as numbers: "
            f"write them as text like {text} with time_unit: iso"
        }
    common = int(np.gcd.reduce(values))
    step = common & -common
    of_clock = common % 1000 == 0 or common % 3600 == 0
    # numbers of a float32 or float64 of this step are at least 2^23 steps large
    if len(values) >= 3 and step >= GRID and not of_clock and int(values.max()) >= step << 22:
        unit = "s" if clock.fractions else "us" if clock.unit == "iso" else clock.unit
        return {
            "steps": f"column '{column}': all sampled times are multiples of {step} {unit}, as if they had gone "
            "through floats, which loses the order of near ones: write them again from the source"
        }
    return {}


def of_ids(column: str, ids: pa.Array, text: bool) -> Doubts:
    """Of sampled ids (int64 or string; bad ones null); ``text``: they come as text."""
    values = pc.unique(ids.drop_null())
    if not len(values):
        return {}
    if pa.types.is_integer(values.type):
        for kind, bits in ((np.float64, 53), (np.float32, 24)):
            large = [v for v in values.to_pylist() if abs(v) >= 2**bits]
            if len(large) >= ENOUGH and all(int(kind(v)) == v for v in large):
                return {
                    f"{column} floats": f"column '{column}': all {len(large):,} sampled ids of 2^{bits} or more are "
                    f"numbers that a {np.dtype(kind).name} can hold ({large[0]}), as if they had gone through floats, "
                    "which makes different ids one: write them again from the source"
                }
        return {}
    if not text:
        return {}
    doubts: Doubts = {}
    if nothing := [w for w in WORDS_FOR_NOTHING if pc.index(values, w).as_py() >= 0]:
        doubts[f"{column} words"] = (
            f"column '{column}': '{nothing[0]}' is an id like any other here: if it stands for a missing one, name it "
            "in csv.null_values, or write such ids as null"
        )
    spelled = values.to_pylist()
    if all(t[:1] + t[-1:] in ("[]", "()", "{}") for t in spelled):
        doubts[f"{column} lists"] = (
            f"column '{column}': {_short(spelled[0])} looks like a list, and is read as one id: the log needs a row an "
            "action; explode the lists first"
        )
    elif decimals := [t for t in spelled if _is_float(t)]:
        doubts[f"{column} decimals"] = (
            f"column '{column}': {_short(decimals[0])} is read as text, another id than '{float(decimals[0]):.0f}': "
            "write ids as integers if they are integers that became floats"
        )
    return doubts


def _is_float(text: str) -> bool:
    """1.0 and 1.5e+18, not 007, 12 or 1e3 (an article's number may look so)."""
    whole, dot, decimals = text.partition(".")
    digits, _, exponent = decimals.lower().partition("e+")
    if not (dot and whole.lstrip("-").isdigit() and digits.isdigit()):
        return False
    return (exponent.isdigit() and "e+" in decimals.lower()) or not digits.strip("0")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
