"""PublishedSource: data sets that others publish, from their own files, wherever these are."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from gr.data.dataset import SequenceDataset
from gr.data.making.download import Published, downloads, obtain
from gr.data.making.engine import IN_PROCESS, Engine
from gr.data.making.prepare import Actions, Described, prepare
from gr.data.making.schema import Preparation
from gr.data.making.sources.base import QUIET, Source
from gr.progress import Progress


class PublishedSource(Source):
    """``--source`` is a folder with the published files, the published file itself, a URL, or nothing: its own URL."""

    published: ClassVar[Published]

    class Options(Preparation):
        """``cache``: folder for downloads and unpacked files, by default ``downloads`` beside OUT (where that is a
        URL: in the current folder)."""

        cache: str | None = None

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        cache = downloads(self.options.cache, out)
        actions, described = self.read(obtain(source, self.published, cache, progress))
        return prepare(
            actions,
            out,
            self.name,
            self.options,
            described=described,
            overwrite=overwrite,
            progress=progress,
            provenance={
                "source": source or self.published.url,
                "options": self.options.model_dump(mode="json"),
            },
            engine=engine,
        )

    def read(self, folder: Path) -> tuple[Actions, Described | None]:
        """The log and the catalogue in the folder that holds ``published.files``."""
        raise NotImplementedError
