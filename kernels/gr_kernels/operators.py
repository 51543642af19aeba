"""Operators of torch.library, which torch.compile and torch.export see as one call of tensors and numbers: how they
are defined, and how an object is taken apart into such arguments and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SPACE = "gr_kernels"


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> None:
    """Defines gr_kernels::<name>.

    schema: "(Tensor x, int count) -> Tensor"; no argument is written to, and no result is one or a view of one.
    fake: results of the right shapes, with nothing computed. keep, backward: torch.library.register_autograd's
    setup_context and gradients.
    """
    full_name = f"{SPACE}::{name}"
    torch.library.define(full_name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full_name, "default", run)
    torch.library.register_fake(full_name, fake)
    if backward is not None:
        torch.library.register_autograd(full_name, backward, setup_context=keep)


def refuse_twice(name: str) -> None:
    """Makes differentiating gr_kernels::<name>, which computes gradients, an error in a sentence."""

    def refuse(ctx: Any, *d_gradients: Any) -> None:
        first = name.replace("_backward", "")
        raise RuntimeError(f"{SPACE}::{first} is differentiable once, and its gradient was differentiated.")

    torch.library.register_autograd(f"{SPACE}::{name}", refuse)


def signed(key: int) -> int:
    """The int64 with the bits of a 64-bit key, as operators take it."""
    return key - 2**64 if key >= 2**63 else key


def unsigned(key: int) -> int:
    """The key that `signed` was given."""
    return key + 2**64 if key < 0 else key


@dataclass(frozen=True)
class Field:
    """An argument of an operator.

    type: as schemas write it; "key" is a 64-bit key, which changes with every call (a SymInt needs no new graph).
    path: where an object has it: ("mask", "window") for x.mask.window; () for an argument that is no part of one.
    """

    name: str
    type: str
    path: tuple[str, ...] = ()

    @property
    def declaration(self) -> str:
        return f"{'SymInt' if self.type == 'key' else self.type} {self.name}"

    @property
    def tensor(self) -> bool:
        return self.type.startswith("Tensor")

    def flat(self, whole: Any) -> Any:
        """The argument, from the object it is a part of."""
        for name in self.path:
            whole = getattr(whole, name)
        if self.type == "key":
            return signed(whole)
        return float(whole) if self.type == "float" else whole


def field(declaration: str, path: str | None = None) -> Field:
    """Of "Tensor? targets"; path: "mask.targets", by default the name alone."""
    type_, name = declaration.split(" ")
    return Field(name, type_, tuple((path or name).split(".")))


class Arguments:
    """The arguments of an operator in order: the one table of what their names, types and places are."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self.index = {field.name: place for place, field in enumerate(self.fields)}
        self.tensors = [place for place, field in enumerate(self.fields) if field.tensor]

    def __len__(self) -> int:
        return len(self.fields)

    @property
    def schema(self) -> str:
        return ", ".join(field.declaration for field in self.fields)

    def flatten(self, whole: Any) -> tuple[Any, ...]:
        """An object's parts."""
        return tuple([field.flat(whole) for field in self.fields])

    def unflatten(self, flat: Sequence[Any], classes: Mapping[str, Callable[..., Any]]) -> Any:
        """The object whose parts they are. classes: what makes x, x.mask, ..., by path: {"": X, "mask": Mask}."""
        parts: dict[str, dict[str, Any]] = {path: {} for path in classes}
        for field, value in zip(self.fields, flat, strict=True):
            *path, name = field.path
            parts[".".join(path)][name] = unsigned(value) if field.type == "key" else value
        made: Any = None
        for place in sorted(classes, key=lambda place: place.count(".") if place else -1, reverse=True):
            made = classes[place](**parts[place])  # the inner ones first, the whole at last
            if place:
                outer, _, name = place.rpartition(".")
                parts[outer][name] = made
        return made

    def by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """The values of a call's arguments."""
        return {field.name: value for field, value in zip(self.fields, values, strict=True)}

    def named(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """A value for every argument, None for those without: gradients, say."""
        unknown = values.keys() - self.index.keys()
        if unknown:
            raise ValueError(f"no arguments are called {', '.join(sorted(unknown))}")
        return tuple([values.get(field.name) for field in self.fields])
