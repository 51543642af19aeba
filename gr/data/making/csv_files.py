"""CSV as a stream of record batches whose columns are bytes, with every malformed record accounted for."""

from __future__ import annotations

import bisect
import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv

from gr.data.making.csv_quotes import ClosedQuotes
from gr.data.making.files import DataFile, require_column
from gr.data.making.schema import Csv
from gr.data.stores import remedy
from gr.errors import UserError, first_line

BLOCK_BYTES = 2**23
SAMPLE_BYTES = 2**20
GAP = "\0gap"  # starts the names of the columns inside of a delimiter
BROKEN = "quotes that aren't closed on their line, or text after a closing one"
FIX_QUOTES = "set csv.escape, csv.newlines_in_values or csv.quote if values are written so"
REPEATED = "names of the columns"
FIX_NAMES = "leave csv.names out if each file names its columns"


@dataclass(frozen=True)
class Malformed:
    """A record that is left out: its number from 0, its text, what is wrong, in general too, and what to do."""

    record: int
    text: str
    problem: str
    kind: str = "wrong number of columns"
    fix: str = ""


@dataclass
class CsvStream:
    """``batches``: columns of bytes (null where empty).  ``malformed``: records left out, in the order they are found:
    before the batch after them is yielded."""

    batches: Iterator[pa.RecordBatch]
    malformed: list[Malformed] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Record numbers of the malformed ones, ascending."""

    def leave_out(self, malformed: Malformed) -> None:
        self.malformed.append(malformed)
        bisect.insort(self.left_out, malformed.record)

    def record(self, row: int) -> int:
        """Number of the record, malformed ones counted, that is row ``row`` of the well-formed ones."""
        return _record(row, self.left_out)


def csv_columns(file: DataFile, form: Csv) -> list[str]:
    """Names of the file's columns."""
    return _header(file, form)[0]


def _header(file: DataFile, form: Csv) -> tuple[list[str], int]:
    """Names of the file's columns, and how many lines they take: blank ones before them count."""
    if form.names is not None:
        return form.names, 0
    try:
        with _text(file, form) as text:
            reader = _records(text, file, form)
            header = next((row for row in reader if row), None)
            lines = reader.line_num
    except OSError as error:  # not compressed as its name says
        raise _unreadable(file, error) from None
    if header is None:
        raise UserError(f"'{file.name}' is empty: remove it, or give the columns' names as csv.names")
    if any("\0" in name for name in header):
        raise UserError(
            f"'{file.name}' has zeros among the bytes of its first line, so it is no text in {form.encoding}: set "
            "csv.encoding (utf-16, for example), or write the file again"
        )
    return header, lines


def read_csv(file: DataFile, form: Csv, columns: list[str], block_bytes: int = BLOCK_BYTES) -> CsvStream:
    """Stream the given columns."""
    names, lines = _header(file, form)
    for column in columns:
        require_column(file.name, column, names)
    delimiter, repeats = _delimiter(file, form)
    if repeats > 1 and form.names is None:
        raise UserError(f"csv.delimiter '{form.delimiter}' needs csv.names: give the columns' names")
    # a delimiter '::' is ':' with a column in between that has to be empty
    gaps = [[name, *(f"{GAP}{i}.{j}" for j in range(repeats - 1))] for i, name in enumerate(names)]
    physical = [part for group in gaps for part in group][: len(names) * repeats - (repeats - 1)]
    read = columns if repeats == 1 else physical
    stream = CsvStream(iter(()))
    first = lines + 1  # the number that Arrow gives the first record
    by_arrow: list[int] = []  # malformed records that Arrow does not count among the rows it gives, ascending
    source, quotes = _utf8(file, form), None
    if form.quote and not form.newlines_in_values:
        source = quotes = ClosedQuotes(source, delimiter, form.quote, form.escape, len(physical))

    def malformed(row) -> str:
        found = (row.actual_columns + repeats - 1) // repeats
        record = (row.number or first) - first
        original = None if quotes is None else quotes.original(row.text)
        bisect.insort(by_arrow, record)
        if original is None:
            stream.leave_out(Malformed(record, row.text, f"has {found} columns instead of {len(names)}"))
        else:
            stream.leave_out(Malformed(record, original, f"has {BROKEN}", BROKEN, FIX_QUOTES))
        return "skip"

    try:
        reader = arrow_csv.open_csv(
            source,
            read_options=arrow_csv.ReadOptions(
                use_threads=False,
                block_size=block_bytes,
                column_names=physical,
                skip_rows=lines,
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter,
                quote_char=form.quote or False,
                escape_char=form.escape or False,
                newlines_in_values=form.newlines_in_values,
                invalid_row_handler=malformed,
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=read,
                column_types={name: pa.binary() for name in read},
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
                null_values=form.null_values,
                check_utf8=False,
            ),
        )
    except (OSError, pa.ArrowInvalid) as error:
        if "Empty CSV file" in str(error):
            return stream
        raise _unreadable(file, error) from None
    stream.batches = _well_formed(_batches(file, reader), stream, by_arrow, columns, form.delimiter)
    return stream


def line_of(file: DataFile, form: Csv, record: int) -> int:
    """Line (from 1) on which a record ends; blank lines are no records."""
    _, header = _header(file, form)
    with _text(file, form) as text:
        if not form.newlines_in_values:
            return next(islice(_filled(text, header), record, None))
        reader = _records(text, file, form)
        left = record + (1 if form.names is None else 0)
        for row in reader:
            if row:
                if left == 0:
                    return reader.line_num
                left -= 1
    raise AssertionError(f"record {record} is not in the file")


def _filled(text: Iterable[str], after: int) -> Iterator[int]:
    """Numbers (from 1) of the lines after number ``after`` that aren't blank."""
    return (number for number, line in enumerate(text, 1) if number > after and line.strip("\r\n"))


def _utf8(file: DataFile, form: Csv) -> pa.NativeFile:
    """The file's content in UTF-8."""
    try:
        source = file.open()
    except OSError as error:
        raise _unreadable(file, error) from None
    if codecs.lookup(form.encoding).name == "utf-8":
        return source
    return pa.transcoding_input_stream(source, form.encoding, "utf-8")


def _text(file: DataFile, form: Csv) -> io.TextIOWrapper:
    """Without the mark that some write before UTF-8."""
    encoding = "utf-8-sig" if codecs.lookup(form.encoding).name == "utf-8" else form.encoding
    return io.TextIOWrapper(file.open(), encoding=encoding, errors="replace", newline="")


def _records(text: io.TextIOWrapper, file: DataFile, form: Csv):
    """csv.reader, of values of any length."""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(
        text,
        delimiter=_delimiter(file, form)[0],
        quotechar=form.quote or None,
        escapechar=form.escape or None,
    )


def _batches(file: DataFile, reader) -> Iterator[pa.RecordBatch]:
    with reader:
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            except (OSError, pa.ArrowInvalid) as error:
                raise _unreadable(file, error) from None
            yield batch


def _well_formed(
    batches: Iterator[pa.RecordBatch],
    stream: CsvStream,
    by_arrow: list[int],
    columns: list[str],
    delimiter: str,
) -> Iterator[pa.RecordBatch]:
    """The batches' ``columns``; a record with something inside of a delimiter is malformed, and one that has the
    columns' names in it: where files were put together, or one that names its columns is said to name none."""
    start = 0
    for batch in batches:
        filled = np.zeros(batch.num_rows, dtype=bool)
        for name in filter(lambda n: n.startswith(GAP), batch.schema.names):
            size = pc.binary_length(batch.column(name))
            filled |= pc.fill_null(pc.greater(size, 0), False).to_numpy(zero_copy_only=False)
        named = _named(batch, columns)
        for row in np.flatnonzero(filled | named).tolist():
            record = _record(start + row, by_arrow)
            parts = [batch.column(n)[row].as_py() or b"" for n in range(batch.num_columns)]
            text = delimiter[0].encode().join(parts).decode("utf-8", errors="backslashreplace")
            if named[row]:
                stream.leave_out(Malformed(record, text, "has the columns' names again", REPEATED, FIX_NAMES))
            else:
                stream.leave_out(Malformed(record, text, f"has text inside of a delimiter {delimiter!r}"))
        start += batch.num_rows
        good = ~(filled | named)
        yield batch.select(columns) if good.all() else batch.select(columns).filter(pa.array(good))


def _named(batch: pa.RecordBatch, columns: list[str]) -> np.ndarray:
    """(n, bool) the rows in which each of several ``columns`` has its name."""
    named = pa.repeat(pa.scalar(len(columns) > 1), batch.num_rows)
    for column in columns:
        if not pc.any(named).as_py():
            break
        named = pc.and_(named, pc.fill_null(pc.equal(batch.column(column), column.encode()), False))
    return named.to_numpy(zero_copy_only=False)


def _record(row: int, left_out: list[int]) -> int:
    """Number of the record that is row ``row`` of those that are not ``left_out`` (ascending)."""
    record = row
    while (skipped := bisect.bisect_right(left_out, record)) != record - row:
        record = row + skipped
    return record


def _unreadable(file: DataFile, error: Exception) -> UserError:
    fix = remedy(error, "check the file and the csv keys of the schema")
    return UserError(f"cannot read '{file.name}' as CSV ({first_line(error)}): {fix}")


def _delimiter(file: DataFile, form: Csv) -> tuple[str, int]:
    if not form.delimiter or len(set(form.delimiter)) != 1:
        raise UserError(
            f"csv.delimiter {form.delimiter!r} cannot be used for '{file.name}': "
            "give one character, or one character repeated"
        )
    return form.delimiter[0], len(form.delimiter)
