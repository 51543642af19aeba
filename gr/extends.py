"""A YAML file over those that it ``extends:``, whatever it describes: a run, a sweep, a schema, a published table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gr import yaml12
from gr.errors import UserError
from gr.overlay import merge
from gr.sections import Section, kind_of
from gr.shipped import find_config


def read_yaml(path: str | Path, schema: type[Section] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, over what its ``extends:`` names (paths relative to the file, or names of configs
    that come with gr).

    schema: what the file describes; ``gr.overlay.merge`` needs it to know a component when it sees one.
    """
    return _read(Path(path), str(path), schema, (), {})


def _read(
    path: Path,
    shown: str,
    schema: type[Section] | None,
    above: tuple[Path, ...],
    known: dict[Path, dict[str, Any]],
) -> dict[str, Any]:
    """``above``: the files that extend this one, outermost first.  ``known``: files already read."""
    file = path.resolve()
    if file in above:
        raise UserError(
            f"'{shown}' extends itself through {' -> '.join(p.name for p in (*above, file))}: break the circle"
        )
    if file not in known:
        raw = _mapping(file, shown, above)
        merged: dict[str, Any] = {}
        for base in _bases(raw.pop("extends", []), shown):
            try:
                found = find_config(base, file.parent)
            except UserError as error:
                raise UserError(f"'{shown}' extends '{base}': {error}") from None
            below = _read(found, base, schema, (*above, file), known)
            merged = merge(merged, below, schema)
        known[file] = merge(merged, raw, schema)
    return known[file]


def _mapping(file: Path, shown: str, above: Sequence[Path]) -> dict[str, Any]:
    """What stands in one file."""
    where = f"'{shown}' (which '{above[-1]}' extends)" if above else f"'{shown}'"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no config file '{shown}': give a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({error}): give a YAML file in UTF-8") from None
    raw = yaml12.load(text, where)
    if not isinstance(raw, dict):
        raise UserError(f"{where} must hold a mapping of keys, and holds {kind_of(raw)}")
    return raw


def _bases(extends: Any, shown: str) -> list[str]:
    """The paths that ``extends:`` names."""
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise UserError(f"'{shown}' extends {extends!r}: give the path of a file, or a list of paths")
    if len(set(bases)) < len(bases):
        raise UserError(f"'{shown}' extends a file twice ({', '.join(bases)}): once is enough")
    return bases
