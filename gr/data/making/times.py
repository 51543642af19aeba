"""Times of a log as int64 ticks since 1970 UTC, and what is noticed on the way.

Nothing wraps around, and nothing that stands for 'unknown' becomes an action's time: what lies outside of the
believable years is a bad row.

Shapes: n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr.data.making.convert import (
    Converted,
    Problem,
    as_written,
    cast_rows,
    checked,
    exact_integers,
    plain,
    readable,
    some,
)
from gr.data.making.schema import LAST_DAY, TICKS_PER_SECOND, LogSchema, TimeUnit

DATE = r"^\d{4}-\d{2}-\d{2}"
# text that ends in an offset from UTC: 2024-01-31T12:30:00Z, 2024-01-31 12:30:00.25+02:00
WITH_OFFSET = r":\d{2}(\.\d+)?(Z|[+-]\d{2}(:?\d{2})?)$"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLY = 315_532_800
"""1980: times before it are doubted where others are later, or would be in another unit."""
LIKELY = (631_152_000, 4_102_444_800)
"""1990 and 2100: what lies between them looks like the time of an action."""
SENTINELS = (0, -1, 2**31 - 1, 2**32 - 1)
"""What programs write for 'unknown'."""
INT64 = (-(2**63), 2**63 - 1)


def day_seconds(day: date) -> int:
    """Seconds since 1970 of the day's beginning, UTC."""
    return (day - EPOCH.date()).days * 86_400


YEAR_2200 = day_seconds(LAST_DAY)


def when(seconds: float) -> str:
    """2024-01-31 12:30:00, or seconds where no calendar has them."""
    try:
        return (EPOCH + timedelta(seconds=int(seconds))).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return f"{seconds:,.0f} s after 1970"


def likely_unit(number: int, per_second: int) -> tuple[str, float] | None:
    """The unit other than that of ``per_second`` ticks in which a number is a likely time, and the seconds since 1970
    that it would be then."""
    for unit in ("s", "ms", "us", "ns"):
        seconds = number / TICKS_PER_SECOND[unit]
        if TICKS_PER_SECOND[unit] != per_second and LIKELY[0] <= seconds < LIKELY[1]:
            return unit, seconds
    return None


@dataclass(frozen=True)
class Clock:
    """How the log's times are read, fixed before any of it is.

    ``unit``: of numbers, of timestamps the finest in any file, or iso.  ``typed``: timestamps or dates.
    ``fractions``: seconds with decimals.  ``zone``: of times that name none; None: UTC.  Times of [first, stop)
    seconds are believed; ``unknown``: ticks that stand for an unknown time.
    """

    unit: TimeUnit
    typed: bool
    fractions: bool
    zone: str | None
    first: int
    stop: int
    unknown: tuple[int, ...]

    @staticmethod
    def of(schema: LogSchema, unit: TimeUnit, typed: bool = False, fractions: bool = False) -> Clock:
        per_second = TICKS_PER_SECOND["us" if fractions else unit]
        scale = per_second if typed or fractions or unit == "iso" else 1
        return Clock(
            unit=unit,
            typed=typed,
            fractions=fractions,
            zone=schema.time_zone,
            first=day_seconds(schema.earliest),
            stop=day_seconds(schema.latest),
            unknown=tuple(u * scale for u in schema.unknown_times),
        )

    @property
    def per_second(self) -> int:
        return TICKS_PER_SECOND["us" if self.fractions else self.unit]


@dataclass
class FileTimes:
    """What was seen of a file's times.  ``early``: before 1980, ``sentinels`` not counted among them.  ``zoned``,
    ``naive``: times with and without a zone."""

    rows: int = 0
    first: int | None = None
    last: int | None = None
    early: int = 0
    early_first: int | None = None
    early_last: int | None = None
    sentinels: dict[int, int] = field(default_factory=dict)
    zoned: int = 0
    naive: int = 0

    def span(self, first: int, last: int) -> None:
        self.first = first if self.first is None else min(first, self.first)
        self.last = last if self.last is None else max(last, self.last)

    def merge(self, other: FileTimes) -> None:
        """Take in what was seen of other rows of the file."""
        self.rows += other.rows
        if other.first is not None and other.last is not None:
            self.span(other.first, other.last)
        if other.early_first is not None and other.early_last is not None:
            self.early_span(other.early, other.early_first, other.early_last)
        for sentinel, count in other.sentinels.items():
            self.sentinels[sentinel] = self.sentinels.get(sentinel, 0) + count
        self.zoned += other.zoned
        self.naive += other.naive

    def early_span(self, rows: int, first: int, last: int) -> None:
        self.early += rows
        self.early_first = first if self.early_first is None else min(first, self.early_first)
        self.early_last = last if self.early_last is None else max(last, self.early_last)


class Times:
    """Reads the times of a log's files, in the order of the log."""

    def __init__(self, clock: Clock, zoned: bool | None = None):
        """``zoned``: whether the first time of the log names its zone; None finds out from the first one read."""
        self.clock = clock
        self.seen: dict[str, FileTimes] = {}
        self.zoned = zoned

    def read(self, column: pa.Array, file: str) -> Converted:
        """``column`` of ``file`` as ticks (n, int64; null where bad)."""
        column = plain(column)
        clock, kind = self.clock, column.type
        seen = self.seen.setdefault(file, FileTimes())
        problems: list[Problem]
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            ticks, problems = self._typed(column, seen)
        elif clock.unit == "iso":
            ticks, problems = self._iso(column, seen)
        elif clock.fractions:
            ticks, problems = _seconds(column)
        elif (written := as_written(column)) is not None:
            ticks, problems = written, []
        else:
            problem, fix = f"is not a whole number of time_unit '{clock.unit}'", "check time_unit"
            column, problems = readable(column, problem, fix)
            exact, inexact = exact_integers(column)
            if column.type == pa.string():  # of an integer that became a float before it was written
                exact = pc.replace_substring_regex(exact, r"^(-?[0-9]+)\.0+$", r"\1")
            ticks, bad = cast_rows(exact, pa.int64())
            if bad is not None and column.type == pa.string():
                dates = pc.match_substring_regex(column, DATE)
                problems += some(dates, problem, "set time_unit: iso if times are text")
            problems += inexact + some(bad, problem, fix)
            if column.type == pa.string():
                problems += some(pc.match_substring_regex(column, "^-?0[xX]"), problem, fix)
        span = pc.min_max(ticks)
        if span["min"].is_valid:
            problems += self._believed(ticks, span["min"].as_py(), span["max"].as_py())
        result = checked(ticks, problems)
        self._note(result.values, seen, span if not result.problems else pc.min_max(result.values))
        return result

    def _typed(self, column: pa.Array, seen: FileTimes) -> tuple[pa.Array, list[Problem]]:
        """Timestamps and dates, never to a coarser unit: a cast that fails is out of the finer one's range."""
        kind, unit = column.type, self.clock.unit
        if pa.types.is_date(kind):
            column = column.cast(pa.timestamp("s" if pa.types.is_date32(kind) else "ms"))
        zone = getattr(kind, "tz", None)
        rows = len(column) - column.null_count
        seen.zoned += rows if zone else 0
        seen.naive += 0 if zone else rows
        ticks, bad = cast_rows(column, pa.timestamp(unit, zone))
        problems = some(bad, f"is beyond the years that {unit} in 64 bits reach")
        if zone is None:
            ticks, missing = self._on_clock(ticks)
            problems += missing
        return ticks.cast(pa.int64()), problems

    def _iso(self, column: pa.Array, seen: FileTimes) -> tuple[pa.Array, list[Problem]]:
        problem = "is not a time like 2024-01-31T12:30:00"
        text, problems = readable(column, problem)
        named = pc.match_substring_regex(text, WITH_OFFSET)
        zoned, naive = pc.if_else(named, text, None), pc.if_else(named, None, text)
        local, local_bad = cast_rows(naive, pa.timestamp("us"))
        local, missing = self._on_clock(local)
        problems += some(local_bad, problem) + missing
        ticks = local.cast(pa.int64())
        if zoned.null_count < len(zoned):
            shifted, bad = cast_rows(zoned, pa.timestamp("us", "UTC"))
            problems += some(bad, problem)
            ticks = pc.coalesce(shifted.cast(pa.int64()), ticks)
        seen.zoned += len(zoned) - zoned.null_count
        seen.naive += len(naive) - naive.null_count
        if self.clock.zone is None:
            problems += self._one_kind(named, ticks)
        return ticks, problems

    def _one_kind(self, named: pa.Array, ticks: pa.Array) -> list[Problem]:
        """Without time_zone all times name their zone or none does; the log's first time says which."""
        if self.zoned is None and ticks.null_count < len(ticks):
            self.zoned = pc.filter(named, ticks.is_valid())[0].as_py()
        fix = "set time_zone to the zone of those without, such as UTC"
        if self.zoned:
            return some(pc.invert(named), "names no zone as the log's first times do", fix)
        return some(named, "names its zone, which the log's first times don't", fix)

    def _on_clock(self, local: pa.Array) -> tuple[pa.Array, list[Problem]]:
        """Times without a zone -> UTC.  Of an hour that the clock shows twice the first counts."""
        zone = self.clock.zone
        if zone in (None, "UTC"):
            return local, []
        naive = local.cast(pa.int64())
        per_second = TICKS_PER_SECOND[local.type.unit]
        low, high = (self.clock.first - 172_800) * per_second, (self.clock.stop + 172_800) * per_second
        inside = pc.and_(
            pc.greater_equal(naive, max(low, INT64[0])), pc.less(naive, min(high, INT64[1]))
        )  # the others are refused anyway, and may have no UTC
        known = pc.if_else(inside, local, None)
        utc = pc.assume_timezone(known, zone, ambiguous="earliest", nonexistent="earliest").cast(pa.int64())
        later = pc.assume_timezone(known, zone, ambiguous="earliest", nonexistent="latest").cast(pa.int64())
        skipped = some(pc.not_equal(utc, later), f"is skipped by the clocks of time_zone '{zone}'")
        return pc.coalesce(utc, naive).cast(pa.timestamp(local.type.unit)), skipped

    def _believed(self, ticks: pa.Array, low: int, high: int) -> list[Problem]:
        clock, problems = self.clock, []
        for sentinel in clock.unknown:
            if low <= sentinel <= high:
                problems += some(pc.equal(ticks, sentinel), "stands for an unknown time (unknown_times)")
        unit = "" if clock.typed or clock.unit == "iso" else f" in time_unit '{clock.unit}'"
        first, stop = clock.first * clock.per_second, clock.stop * clock.per_second
        if low < first:
            rows = pc.less(ticks, min(first, INT64[1]))
            fix = (
                self._unit_fix(pc.max(pc.filter(ticks, rows)).as_py())
                or "set earliest if such times are meant"
            )
            problems += some(rows, f"is before {_day(clock.first)}{unit}", fix)
        if high >= stop:
            rows = pc.greater_equal(ticks, max(stop, INT64[0]))
            fix = (
                self._unit_fix(pc.min(pc.filter(ticks, rows)).as_py()) or "set latest if such times are meant"
            )
            problems += some(rows, f"is not before {_day(clock.stop)}{unit}", fix)
        return problems

    def _unit_fix(self, number: int) -> str:
        """What to do about a time outside of the bounds that would be likely in another unit, else ""."""
        clock = self.clock
        if clock.unit != "iso":
            numeric = not clock.typed and not clock.fractions
            raw = number if numeric else number // clock.per_second if clock.fractions else number
            if numeric and (like := dates_as_numbers(np.array([raw]))):
                return f"write times as text like {like} with time_unit: iso"
            per_second = 1 if clock.fractions else clock.per_second
            if found := likely_unit(raw, per_second):
                unit, seconds = found
                if clock.typed:
                    return f"write the column as integers with time_unit: {unit} if it holds these"
                return f"set time_unit: {unit} if it is {when(seconds)}"
        return ""

    def _note(self, ticks: pa.Array, seen: FileTimes, span: pa.Scalar) -> None:
        seen.rows += len(ticks) - ticks.null_count
        if not span["min"].is_valid:
            return
        low, high = span["min"].as_py(), span["max"].as_py()
        seen.span(low, high)
        scale = self.clock.per_second if self.clock.typed or self.clock.unit == "iso" else 1
        scale = 10**6 if self.clock.fractions else scale
        early = pc.less(ticks, EARLY * self.clock.per_second) if low < EARLY * self.clock.per_second else None
        for sentinel in SENTINELS:
            if low <= sentinel * scale <= high:
                same = pc.equal(ticks, sentinel * scale)
                if count := int(pc.sum(same).as_py() or 0):
                    seen.sentinels[sentinel] = seen.sentinels.get(sentinel, 0) + count
                    early = None if early is None else pc.and_not(early, same)
        if early is not None and (count := int(pc.sum(early).as_py() or 0)):
            found = pc.min_max(pc.filter(ticks, early))
            seen.early_span(count, found["min"].as_py(), found["max"].as_py())


def dates_as_numbers(values: np.ndarray) -> str:
    """How to write the first of the values if all are dates written as numbers (20240131, 20240131123000), else ""."""
    if not len(values) or values.min() <= 0:
        return ""
    for pattern, digits, shown in (("%Y%m%d", 8, "%Y-%m-%d"), ("%Y%m%d%H%M%S", 14, "%Y-%m-%dT%H:%M:%S")):
        try:
            days = [datetime.strptime(f"{v:0{digits}d}", pattern) for v in values.tolist()]
        except ValueError:
            continue
        if all(1970 <= d.year < 2100 for d in days):
            return days[0].strftime(shown)
    return ""


def _seconds(column: pa.Array) -> tuple[pa.Array, list[Problem]]:
    """Seconds with decimals as microseconds."""
    problem, fix = "is not a time in seconds", "check time_unit"
    column, problems = readable(column, problem, fix)
    exact, inexact = exact_integers(column)
    seconds, bad = cast_rows(exact, pa.float64())
    problems += inexact + some(bad, problem, fix)
    finite = pc.is_finite(seconds)
    problems += some(pc.invert(finite), problem, fix)
    ticks, bad = cast_rows(pc.round(pc.multiply(pc.if_else(finite, seconds, None), 1e6)), pa.int64())
    return ticks, problems + some(bad, problem, fix)


def _day(seconds: int) -> str:
    return when(seconds)[:10]
