"""Base class of every configuration section, the error for invalid configurations, and shared value types."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """Raised for an invalid configuration; the message names the key, its value and the rule."""


class Section(BaseModel):
    """Base class of every section: immutable; a key that is not a field, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds; pydantic reports it as a validation error."""
    if not condition:
        raise ValueError(message)


def renamed(tree: Any, old: str, new: str, value: Any = None) -> Any:
    """Return the tree with the key `old`, which earlier versions wrote, renamed to `new`.

    The change is logged once. A tree without `old` is returned unchanged.

    Args:
        tree: input of a pydantic `before` validator; a tree that is not a dictionary is returned unchanged.
        old: key of earlier versions.
        new: key of this version.
        value: replaces the value under `old`; None keeps that value.

    Raises:
        ValueError: the tree has both keys.
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
    """Log the line once per process: a run reads its own configuration several times."""
    logging.getLogger("eve_ds").info(line)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""Number in [0, 1]."""

PositiveInt = Annotated[int, Field(ge=1)]
"""Integer of at least 1."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]
"""Number in (0, 1]."""
