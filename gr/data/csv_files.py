"""CSV as a stream of record batches whose columns are bytes, with every malformed record accounted for."""

from __future__ import annotations

import bisect
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.csv as arrow_csv

from gr.data.files import DataFile
from gr.data.schema import Csv
from gr.errors import UserError, nearest

BLOCK_BYTES = 2**23
SAMPLE_BYTES = 2**20


@dataclass
class CsvStream:
    """``batches``: columns of bytes (null where empty).  ``malformed``: records left out for a wrong number of
    columns, as (record number from 0, text, problem), known before the batch after them is yielded."""

    batches: Iterator[pa.RecordBatch]
    malformed: list[tuple[int, str, str]] = field(default_factory=list)

    def record(self, row: int) -> int:
        """Number of the record, malformed ones counted, that is row ``row`` of the well-formed ones."""
        record = row
        while (skipped := bisect.bisect_right(self.malformed, record, key=lambda m: m[0])) != record - row:
            record = row + skipped
        return record


def csv_columns(file: DataFile, form: Csv) -> list[str]:
    """Names of the file's columns."""
    if form.names is not None:
        return form.names
    with io.TextIOWrapper(file.open(), encoding=form.encoding, errors="replace", newline="") as text:
        header = next(
            csv.reader(text, delimiter=_delimiter(file, form)[0], quotechar=form.quote or None), None
        )
    if header is None:
        raise UserError(f"'{file.name}' is empty: remove it, or give the columns' names as csv.names")
    return [name.removeprefix("\ufeff") for name in header]


def read_csv(file: DataFile, form: Csv, columns: list[str], block_bytes: int = BLOCK_BYTES) -> CsvStream:
    """Stream the given columns."""
    names = csv_columns(file, form)
    for column in columns:
        if column not in names:
            raise UserError(f"'{file.name}' has no column '{column}': {nearest(column, names)}")
    delimiter, repeats = _delimiter(file, form)
    if repeats > 1 and form.names is None:
        raise UserError(f"csv.delimiter '{form.delimiter}' needs csv.names: give the columns' names")
    # a delimiter '::' is ':' with an empty column in between
    gaps = [[name, *(f"\0{i}.{j}" for j in range(repeats - 1))] for i, name in enumerate(names)]
    physical = [part for group in gaps for part in group][: len(names) * repeats - (repeats - 1)]
    stream = CsvStream(iter(()))
    first = 1 if form.names is not None else 2  # the number that Arrow gives the first record

    def malformed(row) -> str:
        found = (row.actual_columns + repeats - 1) // repeats
        problem = f"has {found} columns instead of {len(names)}"
        stream.malformed.append(((row.number or first) - first, row.text, problem))
        return "skip"

    try:
        reader = arrow_csv.open_csv(
            pa.PythonFile(file.open(), mode="r") if not file.local else pa.input_stream(file.path, "detect"),
            read_options=arrow_csv.ReadOptions(
                use_threads=False,
                block_size=block_bytes,
                column_names=physical,
                skip_rows=0 if form.names is not None else 1,
                encoding=form.encoding,
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter,
                quote_char=form.quote or False,
                newlines_in_values=form.newlines_in_values,
                invalid_row_handler=malformed,
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=columns,
                column_types={name: pa.binary() for name in columns},
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
    stream.batches = _batches(file, reader)
    return stream


def line_of(file: DataFile, form: Csv, record: int) -> int:
    """Line (from 1) on which a record ends; blank lines are no records."""
    with io.TextIOWrapper(file.open(), encoding=form.encoding, errors="replace", newline="") as text:
        reader = csv.reader(text, delimiter=_delimiter(file, form)[0], quotechar=form.quote or None)
        left = record + (1 if form.names is None else 0)
        for row in reader:
            if row:
                if left == 0:
                    return reader.line_num
                left -= 1
    raise AssertionError(f"record {record} is not in the file")


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


def _unreadable(file: DataFile, error: Exception) -> UserError:
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(
        f"cannot read '{file.name}' as CSV ({reason}): check the file and the csv keys of the schema"
    )


def _delimiter(file: DataFile, form: Csv) -> tuple[str, int]:
    if not form.delimiter or len(set(form.delimiter)) != 1:
        raise UserError(
            f"csv.delimiter {form.delimiter!r} cannot be used for '{file.name}': "
            "give one character, or one character repeated"
        )
    return form.delimiter[0], len(form.delimiter)
