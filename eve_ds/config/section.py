"""Base of every section of the configuration, its error, and the types of its values."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and the rule."""


class Section(BaseModel):
    """Base of every section: immutable, and a key that is not a field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds; pydantic turns it into a problem of the tree."""
    if not condition:
        raise ValueError(message)


def renamed(tree: Any, old: str, new: str, value: Any = None) -> Any:
    """The tree with the key `new` for `old`, which earlier versions wrote; raises ValueError where it has both.

    `value` stands in for the one under `old`; None: it stays. One line of the log says what was read as what.
    """
    if not isinstance(tree, dict) or old not in tree:
        return tree
    if new in tree:
        raise ValueError(f"{old} ({tree[old]!r}) is the former name of {new} ({tree[new]!r}): write {new} in its place")
    rest = {key: item for key, item in tree.items() if key != old}
    rest[new] = tree[old] if value is None else value
    _say_once(f"{old} ({tree[old]!r}) is read as {new} ({rest[new]!r})")
    return rest


@functools.cache
def _say_once(line: str) -> None:
    """A run reads its own configuration several times."""
    logging.getLogger("eve_ds").info(line)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

PositiveInt = Annotated[int, Field(ge=1)]

Share = Annotated[float, Field(gt=0.0, le=1.0)]
