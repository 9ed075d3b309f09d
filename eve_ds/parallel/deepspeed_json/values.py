"""Kinds of values in the DeepSpeed JSON: which values fit, and the rule in words."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Literal, NamedTuple

AUTO = "auto"
"""Value of a setting that the file leaves to the YAML, or to DeepSpeed's default where the YAML has none."""
SHOWN = 80
"""Number of characters after which a value in a message is cut."""


class Kind(NamedTuple):
    """One kind of value."""

    form: Literal["bool", "whole", "number", "text", "texts", "numbers", "mapping", "any"]
    low: float = -math.inf
    high: float = math.inf
    multiple: int = 1
    """What a whole number must be divisible by."""
    choices: tuple[str, ...] = ()
    """All texts that fit, compared without case; empty: any text."""
    null: bool = False
    """Whether null fits too, which means that the key is not given."""

    def fits(self, value: Any) -> bool:
        """Whether a value of the JSON is of this kind. A bool is not a number, and a text is not a bool."""
        if value is None or self.form == "any":
            return self.null or self.form == "any"
        if self.form in ("whole", "number"):
            return self._is_number(value)
        if self.form in ("texts", "numbers"):
            item = TEXT if self.form == "texts" else NUMBER
            return isinstance(value, list) and all(item.fits(one) for one in value)
        is_right = isinstance(value, {"bool": bool, "text": str, "mapping": dict}[self.form])
        return is_right and (not self.choices or value.lower() in self.choices)

    def plain(self, value: Any) -> Any:
        """Value that fits, as DeepSpeed takes it: choices in lower case, and whole numbers without a fraction."""
        if self.choices and isinstance(value, str):
            return value.lower()
        return int(value) if self.form == "whole" and value is not None else value

    def _is_number(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.form == "number":
            return math.isfinite(value)
        return value == int(value) and int(value) % self.multiple == 0

    @property
    def rule(self) -> str:
        """What fits, as the end of "must be"."""
        if self.choices:
            words = "one of " + ", ".join(f'"{choice}"' for choice in self.choices)
        elif self.form in ("whole", "number"):
            words = {"whole": "a whole number", "number": "a number"}[self.form] + self._range()
        else:
            words = {
                "bool": "true or false",
                "text": "a text",
                "texts": "a list of texts",
                "numbers": "a list of numbers",
                "mapping": "a JSON object: write it in braces",
                "any": "any value",
            }[self.form]
        return f"{words} or null" if self.null else words

    def _range(self) -> str:
        divisible = f" divisible by {self.multiple}" if self.multiple > 1 else ""
        if self.low == -math.inf:
            return divisible
        high = "on" if self.high in (math.inf, sys.maxsize) else f"to {self.high:.15g}"
        return f"{divisible} from {self.low:.15g} {high}"


BOOL = Kind("bool")
TEXT = Kind("text")
TEXTS = Kind("texts")
NUMBER = Kind("number")
MAPPING = Kind("mapping")
ANY = Kind("any")
SHARE = Kind("number", low=0, high=1)


def whole(low: int = 0, high: int = sys.maxsize, multiple: int = 1) -> Kind:
    """Whole numbers, also written as floats (5e8), as DeepSpeed takes them."""
    return Kind("whole", low, high, multiple)


def choice(*choices: str) -> Kind:
    """Some texts, in any case."""
    return Kind("text", choices=choices)


def or_null(kind: Kind) -> Kind:
    """The same kind, or null."""
    return kind._replace(null=True)


def show(value: Any) -> str:
    """Return a value as JSON writes it, cut to one short piece of a line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return printable(text)


def printable(text: str) -> str:
    """Return a text without line breaks and control characters, cut to one short piece of a line."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
