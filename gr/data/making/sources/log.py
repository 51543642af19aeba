"""``log``: your own action log, described by a schema file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gr.data.dataset import SequenceDataset
from gr.data.making.append import append, check_appendable
from gr.data.making.described import read_catalogue, read_users
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import name_of
from gr.data.making.files import keep_apart
from gr.data.making.log import LogReader
from gr.data.making.log_types import plain_integer
from gr.data.making.prepare import Described, prepare
from gr.data.making.schema import FieldColumn, FieldOfDataset, LogSchema, Preparation
from gr.data.making.sources.base import QUIET, Source, make_source
from gr.data.sequences import USER_ID
from gr.errors import UserError
from gr.progress import Progress


class ActionLog(Source):
    """Parquet or CSV files with the columns that the schema maps."""

    name = "log"
    reader: type[LogReader] = LogReader

    class Options(LogSchema, Preparation):
        pass

    @classmethod
    def options_from(cls, raw: Mapping[str, Any]) -> Any:
        if "columns" not in raw:
            raise UserError(
                "a log needs a schema: give --schema a YAML file that says which columns are the user, the item and "
                "the time (docs/your-own-data.md shows one)"
            )
        return super().options_from(raw)

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
            raise UserError("a log is read from somewhere: give --source a file, a glob, a folder or a URL")
        options = self.options
        keep_apart(source, out)
        return prepare(
            self.reader(source, options),
            out,
            name_of(out),
            options,
            described=self._described(progress),
            described_users=self._described_users(progress),
            overwrite=overwrite,
            progress=progress,
            provenance={"source": source, "options": options.model_dump(mode="json")},
            engine=engine,
        )

    @staticmethod
    def append(
        source: str,
        to: str,
        *,
        schema: Mapping[str, Any] | str | Path | None = None,
        settings: Sequence[str] = (),
        progress: Progress = QUIET,
    ) -> SequenceDataset:
        """Append the log ``source`` to the dataset in the folder ``to``, which was prepared from a log; ids and fields
        are of the dataset's types.  schema: as it was prepared, without it; ``settings``: ``key=value``, over it."""
        dataset = SequenceDataset(to)
        told = dataset.manifest.provenance
        given: Any = told.get("options", {}) if schema is None else schema
        if schema is None and "columns" not in given:
            raise UserError(
                f"'{to}' doesn't say of which log it was prepared: give --schema the YAML file of the new one"
            )
        made = make_source(ActionLog.name, given, settings)
        assert isinstance(made, ActionLog)
        made.options = _of_types(made.options, dataset)
        if source in [told.get("source"), *(entry.get("source") for entry in told.get("appended", []))]:
            progress.note(f"'{to}' has actions of '{source}' already: what that holds still comes in twice")
        check_appendable(dataset, made.options)
        if made.options.users is not None:
            raise UserError(
                f"users describes users, of whom '{to}' has no columns, and an append gives it none: leave it out, or "
                "prepare the old and the new log together"
            )
        keep_apart(source, to, "to")
        return append(
            dataset,
            LogReader(source, made.options),
            made.options,
            described=made._described(progress),
            progress=progress,
            said={"source": source},
        )

    def _described(self, progress: Progress) -> Described | None:
        catalogue = self.options.catalogue
        if catalogue is None:
            return None
        return lambda integer: read_catalogue(catalogue, integer, progress.note)

    def _described_users(self, progress: Progress) -> Described | None:
        users = self.options.users
        if users is None:
            return None
        return lambda integer: read_users(users, integer, progress.note)


def _of_types(options: Any, dataset: SequenceDataset) -> Any:
    """The schema with the types that the dataset has: what a file of the new log alone would say may be another."""
    kinds: dict[str, Any] = {"int64": "integer", "float64": "float", "string": "string"}
    have = {info.name: kinds[info.type] for info in dataset.manifest.columns if info.type in kinds}
    fields = {}
    for name, spec in options.columns.fields.items():
        fields[name] = FieldColumn(column=spec) if isinstance(spec, str) else spec
        if fields[name].type == "auto" and name in have:
            fields[name] = FieldOfDataset(column=fields[name].column, type=have[name])
    ids = {
        "user_ids": have[USER_ID],
        "item_ids": "integer" if pa.types.is_integer(dataset.catalogue.ids.type) else "string",
    }
    for key, kind in ids.items():
        if getattr(options, key) not in ("auto", kind):
            raise UserError(
                f"'{dataset.path}' has {key} of type {kind}, and the schema says {getattr(options, key)}: leave it "
                "out, or prepare the old and the new log together"
            )
    names = [name.encode() for name in dataset.manifest.action_type_names]
    if options.action_types == "auto" and names:
        ids["action_types"] = "integer" if all(map(plain_integer, names)) else "string"
    return options.model_copy(
        update={"columns": options.columns.model_copy(update={"fields": fields}), **ids}
    )
