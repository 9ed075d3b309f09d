"""Read the file of a DeepSpeed JSON."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.parallel.deepspeed_json.values import show
from eve_ds.reading import read_file

MAX_DIGITS = 30
"""Digits of the longest whole number; no setting needs more."""
_TEXT = r'"(?:\\.|[^"\\])*+"?'
_COMMENT = re.compile(rf"{_TEXT}|(/\*.*?(?:\*/|\Z)|(?://|#)[^\n]*)", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_TEXT}|(,)(?=\s*[}}\]])", re.DOTALL)


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Return the settings of a file, as :func:`eve_ds.parallel.settings.resolve_deepspeed_config` takes them.

    Raises:
        ConfigError: the file cannot be read or is not JSON (UTF-8, with or without byte order mark; finite numbers;
            each key once) with an object at the top. Comments and trailing commas are allowed, as by DeepSpeed.
    """
    name = f"--deepspeed_config {path}"
    try:
        text = read_file(path, limits.SMALL_JSON_BYTES).decode("utf-8-sig")
        content = json.loads(
            _plain(text), object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not JSON: byte {error.start} is not UTF-8: save it as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{name} is not JSON of DeepSpeed: its brackets are nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: the DeepSpeed JSON must be a mapping of settings, not a {type(content).__name__}")
    return content


def _plain(text: str) -> str:
    """Text with blanks in place of comments and trailing commas, so that errors name the right line and column."""
    for noise in (_COMMENT, _TRAILING_COMMA):
        text = noise.sub(lambda found: re.sub(r"[^\n]", " ", found[0]) if found[1] else found[0], text)
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the key {show(name)} appears twice in one object: keep one of them")
        seen[name] = value
    return seen


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text} is not finite: write a finite one")
    return float(text)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:MAX_DIGITS]}... has {len(text)} digits: write a smaller one")
    return int(text)
