"""``recbole``: RecBole's atomic files: tab-separated text whose header gives each column a name and a type.

ml.inter    user_id:token  item_id:token  rating:float  timestamp:float
ml.item     item_id:token  title:token_seq  year:float
"""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, model_validator

from gr.data.dataset import SequenceDataset
from gr.data.making.convert import cast_rows
from gr.data.making.csv_files import csv_columns
from gr.data.making.described import RESERVED, read_catalogue
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import name_of
from gr.data.making.files import DataFile, find_files, is_there
from gr.data.making.log import LogReader
from gr.data.making.prepare import prepare
from gr.data.making.schema import (
    DAY,
    FIRST_DAY,
    GIVEN,
    LAST_DAY,
    CatalogueSchema,
    Columns,
    Csv,
    FieldColumn,
    IdType,
    LogSchema,
    Preparation,
    TimeUnit,
    apart,
    known_encoding,
)
from gr.data.making.sources.base import QUIET, Source
from gr.errors import UserError, nearest
from gr.progress import Progress

TYPES: dict[str, Any] = {"token": "auto", "float": "float", "token_seq": None, "float_seq": None}
"""RecBole's types -> a field's; None: a list, which no action may have."""


class RecBole(Source):
    """``--source``: a folder with ``.inter`` files, or one of them, or a glob or URL.  What else ``.inter`` has becomes
    fields of the actions; an ``.item`` file beside it the catalogue."""

    name = "recbole"

    class Options(Preparation):
        """``user``, ``item``, ``time``, ``value``: names in the header, without types; time and value may be missing
        there unless they are given here.  ``fields``: other columns of ``.inter`` to keep, all without it."""

        user: str = "user_id"
        item: str = "item_id"
        time: str | None = None
        value: str | None = None
        fields: list[str] | None = None
        user_ids: IdType = "auto"
        item_ids: IdType = "auto"
        time_unit: TimeUnit = "s"
        earliest: DAY = FIRST_DAY
        latest: DAY = LAST_DAY
        unknown_times: list[int] = []
        encoding: Annotated[str, AfterValidator(known_encoding)] = "utf-8"

        @model_validator(mode="after")
        def _apart(self) -> Any:
            return apart(self)

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        if source is None:
            raise UserError(
                "atomic files are read from somewhere: give --source a folder, an .inter file or a URL"
            )
        found = source if source.endswith(".inter") else f"{source.rstrip('/')}/*.inter"
        items = f"{found.removesuffix('.inter')}.item"
        files = find_files(found, "csv", key=None)
        # NAME.train.inter and NAME.test.inter are parts of one
        if len(names := sorted({name_of(file.path).partition(".")[0] for file in files})) > 1:
            progress.note(
                f"'{found}' is read as one log, of {', '.join(names)}: name a file if they are several data sets"
            )
        schema = self._schema(files[0], found, progress)
        described = is_there(items)
        if is_there(f"{found.removesuffix('.inter')}.user"):
            progress.note("the .user file is not read: a dataset holds of users what they did")
        return prepare(
            LogReader(found, schema),
            out,
            name_of(out),
            self.options,
            described=(lambda integer: self._items(items, integer)) if described else None,
            overwrite=overwrite,
            progress=progress,
            provenance={"source": source, "options": self.options.model_dump(mode="json")},
            engine=engine,
        )

    @property
    def _form(self) -> Csv:
        return Csv(delimiter="\t", quote="", encoding=self.options.encoding)

    def _schema(self, file: DataFile, found: str, progress: Progress) -> LogSchema:
        """Of the interactions, by the header of the first file."""
        options, types = self.options, _header(file, self._form)
        role = {"user": options.user, "item": options.item, "time": options.time, "value": options.value}
        for name, usual in (("time", "timestamp"), ("value", "rating")):
            if role[name] is None and usual in types and usual not in role.values():
                role[name] = usual
        others = (
            [name for name in types if name not in role.values()]
            if options.fields is None
            else options.fields
        )
        for name in (*filter(None, role.values()), *others):
            if name not in types:
                raise UserError(f"'{file.name}' has no column '{name}': {nearest(name, types)}")
        for key, name in role.items():
            if name is not None and TYPES[types[name]] is None:
                raise UserError(
                    f"'{file.name}', column '{name}': type {types[name]} is a list, and an action has one {key}: set "
                    f"{key} to another column, or write a line an action"
                )
        lists = [name for name in others if TYPES[types[name]] is None]
        if lists and options.fields is not None:
            raise UserError(
                f"'{file.name}', column '{lists[0]}': type {types[lists[0]]} is a list, and a field has one value an "
                "action; leave it out of fields"
            )
        if taken := sorted(GIVEN.intersection(others) - set(lists)):
            raise UserError(
                f"'{file.name}', column '{taken[0]}': a dataset gives a column of its own that name; write another "
                "into the header, or leave it out of fields"
            )
        if lists:
            progress.note(
                f"left out of '{found}', lists: {', '.join(lists)}; a field has one value an action"
            )
        if role["time"] is None:
            progress.note(f"'{file.name}' has no column timestamp: a user's order is that of the lines")
        typed = {name: f"{name}:{kind}" for name, kind in types.items()}
        return LogSchema(
            columns=Columns(
                **{key: typed[name] for key, name in role.items() if name is not None},
                fields={
                    name: FieldColumn(column=typed[name], type=TYPES[types[name]])
                    for name in others
                    if name not in lists
                },
            ),
            user_ids=options.user_ids,
            item_ids=options.item_ids,
            time_unit=options.time_unit,
            earliest=options.earliest,
            latest=options.latest,
            unknown_times=options.unknown_times,
            format="csv",
            csv=self._form,
        )

    def _items(self, path: str, integer_ids: bool) -> pa.Table:
        """item_id and the columns of the ``.item`` files under their own names, numbers as numbers."""
        file = find_files(path, "csv", key=None)[0]
        types = _header(file, self._form)
        if self.options.item not in types:
            raise UserError(
                f"'{file.name}' has no column '{self.options.item}': {nearest(self.options.item, types)}"
            )
        item = f"{self.options.item}:{types[self.options.item]}"
        schema = CatalogueSchema(path=path, item=item, format="csv", csv=self._form)
        table = read_catalogue(schema, integer_ids)
        columns = {}
        for typed in table.column_names:
            name, _, kind = typed.rpartition(":")
            if name in RESERVED:
                raise UserError(
                    f"'{file.name}' has a column '{name}', a name that gr gives: write another into the header"
                )
            columns[name or typed] = _numbers(file, typed, table[typed]) if kind == "float" else table[typed]
        return pa.table(columns)


def _numbers(file: DataFile, name: str, column: pa.ChunkedArray) -> pa.Array:
    numbers, wrong = cast_rows(column.combine_chunks(), pa.float64())
    if wrong is not None:
        row = int(wrong.argmax())
        raise UserError(
            f"'{file.name}', row {row}, column '{name}': {column[row].as_py()!r} is not a number; correct it, or call "
            "the column a token"
        )
    return numbers


def _header(file: DataFile, form: Csv) -> dict[str, str]:
    """Name -> type of the columns."""
    types: dict[str, str] = {}
    for column in csv_columns(file, form):
        name, _, kind = column.rpartition(":")
        if not name or kind not in TYPES:
            raise UserError(
                f"'{file.name}', line 1: {column!r} is not a name and a type such as user_id:token "
                f"({', '.join(TYPES)}); write the header as RecBole does"
            )
        if name in types:
            raise UserError(
                f"'{file.name}', line 1: column '{name}' is there twice; give each a name of its own"
            )
        types[name] = kind
    return types
