"""Sections: the typed parts of a config, and the one sentence for what is wrong with one.

A section is a pydantic model that refuses unknown and ill-typed keys; a component's section is chosen by ``name``
from a table of ``gr.registry``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from importlib import import_module
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
)

from gr import registry
from gr.errors import UserError, nearest

T = TypeVar("T", bound=Hashable)

POSITIVE = Annotated[int, Field(gt=0, lt=2**63)]
COUNT = Annotated[int, Field(ge=0, lt=2**63)]
FRACTION = Annotated[float, Field(ge=0, lt=1)]
SEED = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _distinct(values: list[T]) -> list[T]:
    if repeated := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ValueError(f"{repeated[0]!r} stands in it twice: once is enough")
    return values


DISTINCT = AfterValidator(_distinct)
"""For lists in which nothing may stand twice."""


class Section(BaseModel):
    """A part of the config: immutable, strictly typed, unknown keys refused; a number is finite, and no boolean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    shorthand: ClassVar[str | None] = None
    """The key that a text in place of the section stands for."""

    def idle(self) -> dict[str, str]:
        """Keys that change nothing beside the values of the others, and why not: its own, or dotted ones below."""
        return {}


class ComponentConfig(Section):
    """Base of the configs that components bring; ``name`` is the key in the registry's table.

    A component has its config as a class inside it, called Config, and takes it as its first argument.  The name
    is looked up once, when the config is validated: from then on the config makes its component.
    """

    shorthand = "name"
    name: str

    @classmethod
    def component(cls) -> type:
        """The class that this config is written in."""
        found: Any = import_module(cls.__module__)
        for part in cls.__qualname__.split(".")[:-1]:
            found = getattr(found, part)
        return found

    def build(self, *args: Any, **runtime: Any) -> Any:
        """The component that this config describes; the arguments are what only the running program knows."""
        return self.component()(self, *args, **runtime)


class Choice:
    """The validator of a key whose value is a component's config, and the mark by which ``gr.overlay`` knows it."""

    def __init__(self, table: dict[str, str], path: str, default: str | None) -> None:
        self.table, self.path, self.default = table, path, default

    def parse(self, value: Any) -> ComponentConfig:
        if isinstance(value, ComponentConfig):
            if value.name not in self.table or self.config(value.name) is not type(value):
                raise UserError(
                    f"'{self.path}' cannot be '{value.name}', which is another kind of component: "
                    f"{nearest('', self.table)}"
                )
            return value
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and self.default is not None:
            value = {"name": self.default, **value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise UserError(f"'{self.path}' needs a name: {nearest('', self.table)}")
        return validate(self.config(str(value["name"])), value, self.path)

    def config(self, name: str) -> type[ComponentConfig]:
        return registry.resolve(self.table, name, f"{self.path}.name").Config


def component(table: dict[str, str], path: str, default: str | None = None) -> Any:
    """The type of the key ``path`` whose value is a component's config: looked up by ``name`` in ``table`` when
    validated.  ``default``: the name where none is given."""
    choice = Choice(table, path, default)
    unset = [] if default is None else [Field(default=default, validate_default=True)]
    return SerializeAsAny[Annotated[(ComponentConfig, BeforeValidator(choice.parse), choice, *unset)]]


def validate(section: type[Section], raw: Any, prefix: str) -> Any:
    """``raw`` as a ``section``; ``prefix`` is the dotted key it stands under.  UserError names the bad key."""
    if not isinstance(raw, Mapping | section):
        what = f"config key '{prefix}'" if prefix else "a config"
        raise UserError(f"{what} must be a mapping of keys, not {kind_of(raw)}")
    try:
        return section.model_validate(dict(raw) if isinstance(raw, Mapping) else raw)
    except ValidationError as error:
        raise UserError(_sentence(error, section, prefix)) from None


def idle_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """A sentence for each key that was given a value of its own and changes nothing beside the others."""
    for key, why in section.idle().items():
        *path, last = key.split(".")
        owner: Any = reduce(_part, path, section)
        value = getattr(owner, last)
        if value != type(owner).model_fields[last].get_default(call_default_factory=True):
            yield f"config key '{prefix}{key}' is {shown(value)} and has no effect: {why}"
    for key in type(section).model_fields:
        value = getattr(section, key)
        parts: Iterable[tuple[Any, Any]] = [(None, value)]
        if isinstance(value, list | dict):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
        for index, part in parts:
            if isinstance(part, Section):
                yield from idle_keys(part, f"{prefix}{key}." if index is None else f"{prefix}{key}.{index}.")


def _part(owner: Any, key: str) -> Any:
    return owner[key] if isinstance(owner, Mapping) else getattr(owner, key)


HINTS = {
    "bool_type": "write true or false",
    "string_type": "put it in quotes",
}


def _sentence(error: ValidationError, section: type[Section], prefix: str) -> str:
    """The first problem of a validation error as one sentence, with the dotted key."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join([*([prefix] if prefix else []), *location])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        parent = _section_at(section, location[:-1])
        return f"unknown config key '{key}': {nearest(location[-1], parent.model_fields)}{more}"
    if first["type"] == "missing":
        return f"config key '{key}' is missing: set it in the file or as {key}=VALUE{more}"
    if first["type"] == "model_type":
        return f"config key '{key}' is {shown(first['input'])}: it must be a mapping of keys{more}"
    if first["type"] == "invalid_key" or location[-1:] == ["[key]"]:
        return f"config key '{key.removesuffix('.[key]')}' is no text: put it in quotes{more}"
    message = first["msg"][0].lower() + first["msg"][1:]
    hint = HINTS.get(first["type"]) if isinstance(first["input"], str | int | float) else None
    return f"config key '{key}' is {shown(first['input'])}: {message}{f' ({hint})' if hint else ''}{more}"


def shown(value: Any) -> str:
    """A value in a sentence: not longer than a line."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python does not write integers of thousands of digits
        return "a number of thousands of digits"


def shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def kind_of(value: Any) -> str:
    """What a value that should be a mapping is instead, in words."""
    words = {
        type(None): "nothing",
        str: "a text",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def _section_at(section: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    for part in location:
        if (field := section.model_fields.get(part)) is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section)
    return section
