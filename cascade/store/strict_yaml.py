"""Strict YAML: data only, YAML 1.2 numbers and booleans, no duplicate keys, and the place of every value.

PyYAML's own safe_load reads `1e-5` as text, keeps the last of two equal keys, turns `no` into False and `012` into
10; each of those trains a wrong model without a word.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cascade.runtime.errors import RecipeError

Place = tuple[str | int, ...]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 50
_MAX_NODES = 50_000


@dataclass(frozen=True)
class YamlDocument:
    """The data of a file and where each part of it stands."""

    source: str
    data: Any
    marks: dict[Place, tuple[int, int]]
    """Path of keys -> (line, column), from 1, of the value there; for an entry of a mapping, those of its key."""

    def where(self, place: Place) -> str:
        """'file:line:column' of a path of keys, or of the nearest path above it that the file has."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.marks:
                line, column = self.marks[place[:length]]
                return f"{self.source}:{line}:{column}"
        return self.source


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core schema for scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def read_yaml(path: Path) -> YamlDocument:
    """The strictly read document.

    Raises:
        RecipeError: the file is missing, not UTF-8, too large, or not plain YAML data; every duplicate key is named.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # of a device there may be no end
    except (OSError, ValueError) as error:
        raise RecipeError(str(path), [f"cannot be read: {getattr(error, 'strerror', error)}"]) from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(str(path), [f"has more than the {_MAX_BYTES:,} bytes of any recipe"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"is not UTF-8 text (byte {error.start})"]) from error
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> YamlDocument:
    """The strictly read document of a text; `source` names it in errors.

    Raises:
        RecipeError: the text is not plain YAML data; every duplicate key is named.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(source, loader)
        data = None if node is None else reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise RecipeError(source, [f"{place}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(source, [f"not valid YAML: {error}"]) from error
    if reader.problems:
        raise RecipeError(source, reader.problems)
    return YamlDocument(source, data, reader.marks)


class _Reader:
    """Nodes -> Python values, noting places and problems on the way."""

    def __init__(self, source: str, loader: _Loader):
        self.source, self.loader = source, loader
        self.marks: dict[Place, tuple[int, int]] = {}
        self.problems: list[str] = []
        self.count = 0

    def read(self, node: yaml.Node, place: Place) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or len(place) > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_NODES} values or {_MAX_DEPTH} levels (aliases are counted each time)")
        self.marks.setdefault(place, _position(node))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(child, (*place, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or not node.tag.startswith("tag:yaml.org,2002:"):
            self._problem(node, f"tag {node.tag} is not allowed; files here are plain data")
            return None
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
                self._problem(key_node, "keys are plain words; merge keys (<<) are not supported")
                continue
            if key in values:
                self._problem(key_node, f"key '{key}' stands twice; first in line {lines[key]}")
                continue
            lines[key] = key_node.start_mark.line + 1
            self.marks[(*place, key)] = _position(key_node)
            values[key] = self.read(value_node, (*place, key))
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "int":
            if len(text.lstrip("+-")) > 1 and text.lstrip("+-").startswith("0"):
                self._problem(node, f"number '{text}' has a leading zero; write it without, or in quotes for text")
                return 0
            return int(text) if len(text) < 40 else float(text)
        if kind == "float":
            return float(text)
        if kind == "bool":
            if text.lower() not in ("true", "false"):
                self._problem(node, f"'{text}' is neither true nor false")
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind == "str":
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                self._problem(node, "half of a surrogate pair is no text")
            return text
        self._problem(node, f"tag {node.tag} is not allowed; files here are plain data")
        return None

    def _problem(self, node: yaml.Node, message: str) -> None:
        line, column = _position(node)
        self.problems.append(f"{self.source}:{line}:{column}: {message}")


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which the loader would read as another value."""


_Dumper.yaml_implicit_resolvers = {
    first: _Loader.yaml_implicit_resolvers.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    for first in _Loader.yaml_implicit_resolvers.keys() | yaml.SafeDumper.yaml_implicit_resolvers.keys()
}
_ODD = re.compile(r"[^ -~\u00a0-\ud7ff\ue000-\ufefe\U00010000-\U0010ffff]|[\u2028\u2029]")
"""Line breaks and signs that are written as escapes, as nothing else preserves them."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _ODD.search(value) else None)


_Dumper.add_representer(str, _text)


def write_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
