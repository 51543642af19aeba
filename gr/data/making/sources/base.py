"""Source: the interface of everything that the program ``prepare NAME`` can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from gr import registry
from gr.config import Section, overridden, read_yaml, validate
from gr.data.dataset import SequenceDataset
from gr.data.making.engine import IN_PROCESS, Engine
from gr.progress import Progress

QUIET = Progress()


class Source:
    """A named way to make a sequence dataset.

    A source has a ``name`` (its key in ``registry.DATASETS``), a typed ``Options`` section, and ``prepare``.
    """

    name: ClassVar[str]

    class Options(Section):
        """What ``--set key=value`` may set."""

    def __init__(self, options: Any = None):
        self.options: Any = self.Options() if options is None else options

    @classmethod
    def options_from(cls, raw: Mapping[str, Any]) -> Any:
        """``Options`` from plain dictionaries, checked."""
        return validate(cls.Options, raw, "")

    def prepare(
        self,
        source: str | None,
        out: str,
        *,
        overwrite: bool = False,
        progress: Progress = QUIET,
        engine: Engine = IN_PROCESS,
    ) -> SequenceDataset:
        """Make the dataset in the folder ``out`` from ``source`` (file, folder, glob or URL; None where nothing is
        read).  Raises UserError for bad input, and where ``out`` exists and ``overwrite`` is False."""
        raise NotImplementedError


def make_source(
    name: str, given: Mapping[str, Any] | str | Path = MappingProxyType({}), settings: Sequence[str] = ()
) -> Source:
    """The source ``name`` with the options ``given`` (or those in the YAML file of that path), ``settings``
    (``key=value`` texts) over them."""
    source_class = registry.resolve(registry.DATASETS, name, "dataset")
    if isinstance(given, str | Path):
        given = read_yaml(given, source_class.Options)
    return source_class(source_class.options_from(overridden(given, settings, source_class.Options)))
