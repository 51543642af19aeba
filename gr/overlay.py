"""Laying one config over another: files over those they extend, dotted overrides over files."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from gr import yaml12
from gr.errors import UserError
from gr.sections import Choice, Section, shortened, shown


def merge(
    base: Mapping[str, Any],
    change: Mapping[str, Any],
    schema: Any = None,
    *,
    under: Mapping[str, Any] | None = None,
    path: str = "",
) -> dict[str, Any]:
    """``change`` over ``base``: mappings key by key, all else replaced.

    A component is merged with the same component and replaced whole by another: a change that names none, or the
    one that is there, keeps its other keys; a change of name drops them, for they belonged to another.  A text is
    short for the one key that the section says (a component's ``name``), over a mapping and under one.

    schema: the type of what is merged (a Section), which says what is a component.  under: where ``base`` is itself
    a change, what it is going to be laid over; without it a component of ``base`` that has no name is the default.
    """
    merged = dict(base)
    for key, value in change.items():
        here, place = f"{path}{key}", _place(schema, key)
        old = merged.get(key)
        section, choice = section_of(place)
        if isinstance(old, Mapping) or isinstance(value, Mapping):
            old, value = _spread(old, section), _spread(value, section)
        if not isinstance(value, Mapping) or old is None:
            merged[key] = value
        elif isinstance(old, Mapping):
            below = None if under is None else _mapping(_spread(under.get(key), section))
            if choice is not None and _other(choice, old, value, below):
                merged[key] = dict(value)
            else:
                inside = _inside(place, choice, old, value, below)
                merged[key] = merge(old, value, inside, under=below, path=f"{here}.")
        elif section is not None:
            raise UserError(f"config key '{here}' is {shown(old)}, and keys of it are set besides: drop one")
        else:
            merged[key] = value
    return merged


def overridden(raw: Mapping[str, Any], overrides: Sequence[str], schema: Any) -> dict[str, Any]:
    """``raw`` with dotted ``overrides`` over it.  They are one change: of a component's name and its keys either
    may come first."""
    changes = [parse_override(text) for text in overrides]
    laid = dict(raw)
    for _ in changes:
        together: dict[str, Any] = {}
        for change in changes:
            together = merge(together, change, schema, under=laid)
        known, laid = laid, merge(raw, together, schema)
        if laid == known:
            break  # else a name may have told what was meant by keys before it: once more, knowing it
    return laid


MARK = r"\t+|[\"'\\]|[,|;:#%&@*!?>`^-]+"
"""A value that is read as it stands."""


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` -> ``{'a': {'b': 1}}``; the value is YAML."""
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", key):
        raise UserError(f"'{text}' is not an override: write key.key=value, for example train.epochs=3")
    # a mark alone, as a shell gives a delimiter or a quote, is no YAML, or stands for nothing
    mark = re.fullmatch(MARK, value)
    nested: Any = value if mark else yaml12.load(value, f"the value of '{shortened(text)}'")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _place(schema: Any, key: str) -> Any:
    """The type of ``key`` in what has the type ``schema``; None where nothing is known."""
    for option, _ in _options(schema):
        if isinstance(option, type) and issubclass(option, Section) and key in option.model_fields:
            field = option.model_fields[key]
            return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


def _options(annotation: Any, metadata: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """The types that an annotation allows, each with what is annotated to it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _options(annotation.__origin__, (*metadata, *annotation.__metadata__))
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _options(option, metadata)
    else:
        yield annotation, metadata


def section_of(annotation: Any) -> tuple[type[Section] | None, Choice | None]:
    """The section that an annotation allows, and the choice where it is a component's."""
    for option, metadata in _options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option, next((m for m in metadata if isinstance(m, Choice)), None)
    return None, None


def _spread(value: Any, section: type[Section] | None) -> Any:
    if isinstance(value, str) and section is not None and section.shorthand is not None:
        return {section.shorthand: value}
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _other(
    choice: Choice, old: Mapping[str, Any], value: Mapping[str, Any], below: Mapping[str, Any] | None
) -> bool:
    """Whether ``value`` names another component than ``old`` is, as far as that is known."""
    name = old.get("name", choice.default if below is None else None)
    return "name" in value and name is not None and value["name"] != name


def _inside(
    place: Any,
    choice: Choice | None,
    old: Mapping[str, Any],
    value: Mapping[str, Any],
    below: Mapping[str, Any] | None,
) -> Any:
    """The type of a section's inside; a component's is its own config, asked for only where it matters."""
    if choice is None:
        return place
    name = {"name": choice.default, **(below or {}), **old, **value}["name"]
    nested = any(isinstance(v, Mapping) for v in (*old.values(), *value.values()))
    return choice.config(name) if nested and isinstance(name, str) and name in choice.table else None
