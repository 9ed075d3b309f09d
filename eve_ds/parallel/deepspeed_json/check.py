"""Check a DeepSpeed JSON against the table of keys, and collect everything that is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from eve_ds.config import ConfigError
from eve_ds.parallel.deepspeed_json.keys import (
    CHECKED,
    FOLLOWED,
    KEYS,
    NOTED,
    REFUSED,
    UNUSED,
    WHOLE,
    Rule,
    Section,
)
from eve_ds.parallel.deepspeed_json.values import AUTO, printable, show

JSON = "in the DeepSpeed JSON"
MAX_DEPTH = 20
"""Levels of nesting that are read; no setting needs more."""


class Problems:
    """Everything that is wrong with one file, told in the order of its keys; no text may have a semicolon.

    Args:
        document: content of the file.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.order = {path: number for number, path in enumerate(_paths(document, ""))}
        self.found: list[tuple[str, str]] = []

    def add(self, path: str, text: str) -> None:
        """Add a problem of the key at `path` (`zero_optimization.stage`); of no key: ""."""
        self.found.append((path, text))

    @contextmanager
    def collect(self, path: str = "") -> Iterator[None]:
        """Add a ConfigError of the body as a problem, and go on."""
        try:
            yield
        except ConfigError as error:
            self.add(path, str(error))

    def below(self, path: str) -> bool:
        """Whether a key at or below `path` has a problem."""
        return any(other == path or other.startswith(f"{path}.") for other, _ in self.found)

    def raise_all(self) -> None:
        """Raise one ConfigError with all problems; do nothing if there are none."""
        last = len(self.order)
        ordered = sorted(self.found, key=lambda problem: self.order.get(problem[0], last))
        if ordered:
            raise ConfigError("; ".join(dict.fromkeys(text for _, text in ordered)))


def _paths(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict) and prefix.count(".") < MAX_DEPTH:
        for key, item in value.items():
            path = f"{prefix}{key}"
            yield path
            yield from _paths(item, f"{path}.")


class Checked(NamedTuple):
    """Result of :func:`check_keys`."""

    settings: dict[str, Any]
    """Values that DeepSpeed may get; without "auto", comments, and keys that have no effect here."""
    notes: list[str]
    """One line for every value that has no effect here."""


def check_keys(document: dict[str, Any], problems: Problems) -> Checked:
    """Check names, types and uses of all keys.

    A value "auto" counts as not given, and a key that starts with `_` or `//` as a comment. Whole floats (5e8) become
    whole numbers.

    Args:
        document: content of the file.
        problems: gets every key that is unknown, refused, or has a value of another type.
    """
    zero = document.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    walk = _Walk(problems, [], stage if stage in (0, 1, 2, 3) else None)
    return Checked(walk.section(document, KEYS, ""), walk.notes)


class _Walk(NamedTuple):
    problems: Problems
    notes: list[str]
    stage: int | None
    """None if the file's stage is none, which is a problem of its own."""

    def section(self, values: dict[str, Any], rules: Section, prefix: str) -> dict[str, Any]:
        """Check one object; return what is left of it."""
        kept: dict[str, Any] = {}
        for key, value in values.items():
            path = f"{prefix}{key}"
            if key.startswith(("_", "//")):
                continue
            rule = rules.get(key) if key != WHOLE else None
            if rule is None:
                name = printable(path)
                self.problems.add(path, f"{name} {JSON} is no key of DeepSpeed {FOLLOWED}: {_nearest(path, rules)}")
            elif isinstance(rule, Rule):
                if value != AUTO and self.value(path, value, rule):
                    kept[key] = rule.kind.plain(value)
            elif isinstance(value, dict):
                inner = self.section(value, rule, f"{path}.")
                whole = rule.get(WHOLE)
                if isinstance(whole, Rule):
                    self.value(path, value, whole)
                elif inner:
                    kept[key] = inner
            elif value is not None:
                self.problems.add(path, f"{path} ({show(value)}) {JSON} must be a JSON object: write it in braces")
        return kept

    def value(self, path: str, value: Any, rule: Rule) -> bool:
        """Check one value; return whether DeepSpeed gets it."""
        named = f"{path} ({show(value)}) {JSON}"
        if not rule.kind.fits(value):
            quotes = ", without quotes" if isinstance(value, str) and not rule.kind.choices else ""
            self.problems.add(path, f"{named} must be {rule.kind.rule}{quotes}")
            return False
        if rule.use == UNUSED or (self.stage in (None, *rule.neutral_at) and _is_neutral(rule.kind.plain(value), rule)):
            return False
        if self.stage not in (None, *rule.stages):
            stages = ", ".join(map(str, rule.stages[:-1])) + " and " * (len(rule.stages) > 1) + str(rule.stages[-1])
            self.notes.append(f"{named} has no effect: it acts at ZeRO {stages} only, and the stage is {self.stage}")
            return False
        if rule.use == REFUSED:
            self.problems.add(path, f"{named} cannot be used: {rule.why}")
            return False
        if rule.use == NOTED:
            self.notes.append(f"{named} has no effect: {rule.why}")
            return False
        return value is not None or rule.use == CHECKED


def _is_neutral(value: Any, rule: Rule) -> bool:
    """Whether a value means the same as no value; a feature may also be turned off by its own switch."""
    if isinstance(value, dict) and rule.use == REFUSED and rule.kind.form == "any":
        return value.get("enabled", True) in (False, AUTO) or not value
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in rule.neutral)


def _nearest(path: str, rules: Section) -> str:
    """What the writer of an unknown key may have meant."""
    key = path.rpartition(".")[2]
    places = [place for place in _places(KEYS, "") if place.rpartition(".")[2] == key]
    if places:
        return f"it belongs at {places[0]}"
    near = difflib.get_close_matches(key.lower(), [name for name in rules if name], n=1)
    if near:
        return f"did you mean {near[0]}?"
    everywhere = {place.rpartition(".")[2]: place for place in reversed(list(_places(KEYS, "")))}
    near = difflib.get_close_matches(key.lower(), list(everywhere), n=1)
    return f"did you mean {everywhere[near[0]]}?" if near else "remove it"


def _places(rules: Section, prefix: str) -> Iterator[str]:
    """Paths of all keys of the table."""
    for key, rule in rules.items():
        if key != WHOLE:
            yield f"{prefix}{key}"
            if not isinstance(rule, Rule):
                yield from _places(rule, f"{prefix}{key}.")
