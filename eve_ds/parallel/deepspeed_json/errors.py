"""Turn what DeepSpeed raises about its configuration into one line that names the key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError

from eve_ds.config import ConfigError
from eve_ds.parallel.deepspeed_json.check import JSON
from eve_ds.parallel.deepspeed_json.values import show
from eve_ds.resources import lack

NOT_ABOUT_SETTINGS = (ConfigError, torch.distributed.DistError)
"""Exceptions that pass unchanged, as those of :func:`eve_ds.resources.lack` do: the second one is of a rank that is
gone."""
LONGEST = 300
"""Characters of DeepSpeed's own words that a message repeats."""


@contextmanager
def deepspeed_errors(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Raise any exception of `deepspeed.initialize` as a ConfigError of one line.

    Args:
        deepspeed_config: configuration that DeepSpeed gets; the message names those of its keys that the exception
            mentions.
    """
    try:
        yield
    except NOT_ABOUT_SETTINGS:
        raise
    except ValidationError as error:
        raise ConfigError("; ".join(_of_pydantic(error, deepspeed_config))) from error
    except Exception as error:
        if lack(error) is not None:
            raise
        words = " ".join(str(error).split())[:LONGEST] or type(error).__name__
        named = [path for path, _ in _settings(deepspeed_config, "") if _mentions(words, path)]
        about = f": look at {', '.join(named)} {JSON}" if named else f" {JSON}"
        raise ConfigError(f"DeepSpeed cannot use its configuration ({words}){about}") from error


def _of_pydantic(error: ValidationError, deepspeed_config: dict[str, Any]) -> Iterator[str]:
    settings = dict(_settings(deepspeed_config, ""))
    for problem in error.errors():
        end = ".".join(str(part) for part in problem["loc"])
        path = next((path for path in settings if path.endswith(f".{end}")), end)
        message = " ".join(problem["msg"].split())
        yield f"{path} ({show(problem['input'])}) {JSON} is refused by DeepSpeed: {message}"


def _settings(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        path = f"{prefix}{key}"
        yield path, item
        if isinstance(item, dict):
            yield from _settings(item, f"{path}.")


def _mentions(words: str, path: str) -> bool:
    """Whether a text has the last part of a path, with underscores or spaces; words such as `enabled` tell nothing."""
    name, text = path.rpartition(".")[2], re.sub(r"[\s_]+", "_", words.lower())
    return "_" in name and re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text) is not None
