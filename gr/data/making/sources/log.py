"""``log``: your own action log, described by a schema file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gr.data.dataset import SequenceDataset
from gr.data.making.described import read_catalogue
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.executor import name_of
from gr.data.making.log import LogReader
from gr.data.making.prepare import prepare
from gr.data.making.schema import LogSchema, Preparation
from gr.data.making.sources.base import QUIET, Source
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
        reader = self.reader(source, options)
        catalogue = options.catalogue
        return prepare(
            reader,
            out,
            name_of(out),
            options,
            described=None
            if catalogue is None
            else lambda integer: read_catalogue(catalogue, integer, progress.note),
            overwrite=overwrite,
            progress=progress,
            provenance={"source": source, "options": options.model_dump(mode="json")},
            engine=engine,
        )
