"""Source: the interface of everything that the program ``prepare NAME`` can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from gr import registry
from gr.config import Section, merge, parse_override, validate
from gr.data.dataset import SequenceDataset
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
        self, source: str | None, out: str, *, overwrite: bool = False, progress: Progress = QUIET
    ) -> SequenceDataset:
        """Make the dataset in the folder ``out`` from ``source`` (file, folder, glob or URL; None where nothing is
        read).  Raises UserError for bad input, and where ``out`` exists and ``overwrite`` is False."""
        raise NotImplementedError


def make_source(name: str, given: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> Source:
    """The source ``name`` with the options ``given``, ``settings`` (``key=value`` texts) over them."""
    source_class = registry.resolve(registry.DATASETS, name, "dataset")
    raw = dict(given or {})
    for text in settings:
        raw = merge(raw, parse_override(text))
    return source_class(source_class.options_from(raw))
