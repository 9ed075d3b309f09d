"""Base class of every configuration section, the error for invalid configurations, and shared value types."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """Raised for an invalid configuration; the message names the key, its value and the rule."""


class Section(BaseModel):
    """Base class of every section: immutable; a key that is not a field, infinity and NaN are errors.

    So is a truth value for a number: `yes` is no probability and no number of steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in values):
            kinds = set(_types(cls.model_fields[str(info.field_name)].annotation))
            if kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("truth_value", "Input should be a number, not true or false")
        return value


def _types(annotation: Any) -> Iterator[Any]:
    """Types that an annotation names, at any depth."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


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

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
"""Integer of at least 1 that fits into 64 bits."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]
"""Number in (0, 1]."""

ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Number in [0, 1)."""


def expand_path(value: Any) -> Any:
    """Expand `~` and `$NAME` in a path as a shell does, since no shell reads a YAML file or `--set`.

    Args:
        value: input for a path or a list of paths; a value of another type is returned unchanged.

    Raises:
        PydanticCustomError: the text is empty or has a NUL character, or names a variable that is not set.
    """
    if isinstance(value, list):
        return [expand_path(item) for item in value]
    if not isinstance(value, str):
        return value
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("path", "Input should be a path, which is not empty and has no NUL character")
    path = os.path.expandvars(os.path.expanduser(value))
    unset = re.search(r"\$([A-Za-z_]\w*|\{\w+\})", path)
    if unset is not None:
        raise PydanticCustomError("path", "Input should be a path: the variable {name} is not set", {"name": unset[0]})
    return path


FilePath = Annotated[Path, BeforeValidator(expand_path)]
"""Path of a file or folder."""
