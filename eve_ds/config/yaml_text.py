"""Parse YAML of unknown origin: plain values only, keys that are text and stand once, bounded depth and size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from eve_ds import limits
from eve_ds.printable import excerpt

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_NAMES = {"bool": "a truth value", "int": "a number", "float": "a number", "null": "null", "timestamp": "a date"}
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_TOO_LARGE = f"more than {limits.CONFIG_VALUES:,} values, aliases expanded"
_TOO_DEEP = f"lists and mappings are nested deeper than {limits.JSON_DEPTH} levels"


def parse_yaml(text: str) -> Any:
    """Parse a document of YAML 1.1 as PyYAML's safe loader does, with these differences.

    A date is text. A number that starts with 0, which YAML 1.1 reads as octal, is refused, and so is every tag that
    does not name a type of JSON. An error message gives line and column.

    Raises:
        ValueError: the text is not such a document, has a key twice or one that is no text, or exceeds the caps of
            :mod:`eve_ds.limits` for values, depth or digits; the message is one line.
    """
    try:
        tree = _Loader(text).get_single_data()
    except RecursionError:  # hundreds of levels, or a merge key that names its own mapping
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the latter two: `!!int x`, `!!bool x`
        raise ValueError(_reason(error)) from None
    _check_size(tree)
    return tree


class _Loader(yaml.SafeLoader):
    """Loader of the types that JSON has."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count a value while it is parsed, since parsing takes more memory than the text."""
        self._values += 1
        if self._values > limits.CONFIG_VALUES:
            raise ValueError(_TOO_LARGE)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys of a mapping before those of merge keys (`<<`) join them."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}str", _MERGE):
                raise _error(key, f"the key {_key(key)} is no text but {_type(key)}: write it in quotes")
            if key.value in seen and key.tag != _MERGE:
                raise _error(key, f"the key {_key(key)} stands twice")
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert the mappings of merge keys, which may multiply."""
        super().flatten_mapping(node)
        if len(node.value) > limits.CONFIG_VALUES:
            raise ValueError(_TOO_LARGE)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Parse a whole number."""
        if len(node.value) > limits.JSON_DIGITS:
            raise _error(node, f"a number has {len(node.value):,} digits, more than {limits.JSON_DIGITS}")
        if _OCTAL.fullmatch(node.value):
            plain = node.value.replace("_", "").lstrip("+-0") or "0"
            raise _error(node, f"{node.value} would be octal, write {plain}, or text in quotes")
        return int(super().construct_yaml_int(node))


_Loader.yaml_constructors = {
    **{f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"] for name in _PLAIN},
    f"{_TAG}int": _Loader.construct_int,
    f"{_TAG}timestamp": yaml.SafeLoader.yaml_constructors[f"{_TAG}str"],
    None: yaml.SafeLoader.yaml_constructors[None],  # raises the error for any other tag
}


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _reason(error: Exception) -> str:
    """Problem, line and column of an error on one line, without the excerpt that PyYAML adds."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, LookupError):  # such as KeyError('x') for `!!bool x`
        return "a value does not fit its tag"
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    words = " ".join(part for part in (error.context, error.problem) if part)
    return f"{words} (line {mark.line + 1}, column {mark.column + 1})"


def _key(node: yaml.Node) -> str:
    return f"'{excerpt(node.value)}'" if isinstance(node, yaml.ScalarNode) else "in brackets"


def _type(node: yaml.Node) -> str:
    return _NAMES.get(node.tag.removeprefix(_TAG), "a list, a mapping or of another type")


def _check_size(tree: Any) -> None:
    """Raise ValueError for a tree beyond the caps; aliases make parts of it occur many times, or contain themselves."""
    level, values = [tree], 1
    for _ in range(limits.JSON_DEPTH + 1):
        level = list(itertools.islice(_children(level), limits.CONFIG_VALUES))
        values += len(level)
        if values > limits.CONFIG_VALUES:
            raise ValueError(_TOO_LARGE)
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _children(level: list[Any]) -> Iterator[Any]:
    for node in level:
        if isinstance(node, dict):
            yield from node.values()
        elif isinstance(node, list):
            yield from node
