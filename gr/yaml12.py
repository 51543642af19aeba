"""YAML 1.2, read strictly: the only way that gr reads YAML, and writes it so that it reads the same again.

PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90, yes is true and 2024-01-01 a date, and of two equal keys takes the
last.  Here plain scalars mean what YAML 1.2's core schema says (null, true, false, decimal, 0o17 and 0x1F integers,
decimal floats, .inf, .nan), everything else is text; a key is text, stands once in its mapping, and aliases cannot
grow a file to more than ``MOST_VALUES`` values.  Merge keys (``<<``) of YAML 1.1 stay.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from gr.errors import UserError

MOST_VALUES = 100_000
"""Values of a document, each alias counted with all that it stands for."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # tag -> (what a plain scalar must match, its possible first characters)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


def load(text: str, where: str) -> Any:
    """The one document of ``text``; ``where`` names it in errors.  Raises UserError, with the line."""
    try:
        loader = _Loader(text)
        loader.where = where
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(_sentence(error, where)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{where} is not valid YAML, line {line}: the character {text[error.position]!r} is not allowed"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read") from None


def dump(value: Any) -> str:
    """``value``, of dictionaries, lists, texts, numbers, booleans and None, as YAML; key order is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    where: str
    yaml_implicit_resolvers = {}  # none of YAML 1.1's
    yaml_constructors = {}

    def check(self, root: yaml.Node) -> None:
        """Refuse keys that are no text or stand twice, and aliases that stand for too much, before anything is
        made of them."""
        sizes: dict[int, int] = {}

        def size(node: yaml.Node) -> int:
            if (known := sizes.get(id(node))) is not None:
                if known == 0:
                    self._refuse(node, "what an alias stands for holds the alias itself: write it out")
                return known
            sizes[id(node)] = 0  # being counted
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                children = [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = total = 1 + sum(size(child) for child in children)
            if total > MOST_VALUES:
                self._refuse(
                    node, f"more than {MOST_VALUES:,} values, aliases counted with what they stand for"
                )
            return total

        size(root)

    def _check_keys(self, mapping: yaml.MappingNode) -> None:
        first: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                self._refuse(key, f"{shown} is used as a key, and keys are text: put it in quotes")
            if key.value in first:
                self._refuse(
                    key,
                    f"'{key.value}' stands twice in the same mapping (first in line {first[key.value]}): "
                    "keep one, or join the two",
                )
            first[key.value] = line

    def _refuse(self, node: yaml.Node, why: str) -> None:
        raise UserError(f"{self.where}, line {node.start_mark.line + 1}: {why}")

    def number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node))
        kind = "int" if node.tag == _TAG + "int" else "float"
        if not re.fullmatch(_SCALARS[kind][0], text):  # a tag may claim anything
            self._refuse(node, f"'{text}' is no {kind} of YAML 1.2")
        try:
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:
            self._refuse(node, f"a number of {len(text):,} digits is too long")
            raise

    def boolean(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node))
        if not re.fullmatch(_SCALARS["bool"][0], text):
            self._refuse(node, f"'{text}' is no boolean: write true or false")
        return text.lower() == "true"


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _resolvers(loader_or_dumper: Any) -> None:
    for name, (pattern, first) in _SCALARS.items():
        loader_or_dumper.add_implicit_resolver(_TAG + name, re.compile(f"^(?:{pattern})$"), first)


_resolvers(_Loader)
_Dumper.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
_resolvers(_Dumper)
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.number)
_Loader.add_constructor(_TAG + "bool", _Loader.boolean)
for _name in ("null", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _name, yaml.SafeLoader.yaml_constructors[_TAG + _name])
_Loader.yaml_constructors[None] = _Loader.construct_undefined


def _sentence(error: yaml.MarkedYAMLError, where: str) -> str:
    """What the parser found, in one sentence with the line."""
    mark = error.problem_mark or error.context_mark
    line = f", line {mark.line + 1}" if mark is not None else ""
    problem = " ".join(f"{error.problem or error.context}".split())
    if "another document" in problem:
        problem = "a second document begins here: keep one"
    elif "'\\t'" in problem:
        problem = "a tab stands where YAML wants spaces: indent with spaces"
    elif "determine a constructor for the tag" in problem:
        problem = problem.replace(
            "could not determine a constructor for the tag", "there is no such thing as"
        )
    context = f" {' '.join(error.context.split())}" if error.context and problem == error.problem else ""
    return f"{where} is not valid YAML{line}: {problem}{context}"
