"""Load tokenizers of unknown origin: files of bounded size and depth, no code of theirs, no long wait for a network."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, snapshot_download
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eve_ds import limits
from eve_ds.config import ConfigError
from eve_ds.printable import excerpt
from eve_ds.reading import depth_exceeds, parse_json, read_file, read_json
from eve_ds.storage import reason

FILES = ("*.json", "*.txt", "*.model")
"""Names of files that describe a tokenizer; pickles and code are none of them."""
HUB_SECONDS = 5.0
"""Seconds to wait for the Hub to answer, before the cache is tried; transformers would retry for a minute."""
GROWTH = 1000
"""Factor by which the replacements of a normalizer may lengthen a text; published tokenizers double it."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ConfigError: the file cannot be read, or describes no tokenizer.
    """
    with as_config_error(f"tokenizer file {path} cannot be read"):
        text = read_file(path, limits.TOKENIZER_BYTES).decode("utf-8-sig")
        _check_document(parse_json(text))
        return Tokenizer.from_str(text)


def load_pretrained(name: str) -> PreTrainedTokenizerFast:
    """Load a folder written by `save_pretrained`, or the tokenizer of a Hub name.

    Code that `auto_map` in tokenizer_config.json names is neither run nor asked for: a tokenizer that needs it is
    refused. Of a Hub name only :data:`FILES` are downloaded, unless the cache of the Hub's library holds them.

    Raises:
        ConfigError: there is no such folder or name, or it holds no fast tokenizer that can be loaded.
    """
    folder = Path(name) if os.path.isdir(name) else _downloaded(name)
    problem = f"tokenizer '{name}' is not 'scenes', a tokenizer.json, or a folder or name with one"
    if not any(next(folder.glob(pattern), None) for pattern in FILES):
        raise ConfigError(f"{problem}: it holds no tokenizer.json and no other file of a tokenizer")
    with as_config_error(problem):
        _check_files(folder)
    if _names_code(folder):
        problem = f"tokenizer '{name}' names code of its own (auto_map), which is never run: name its tokenizer.json"
    with as_config_error(problem):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"tokenizer '{name}' ({type(tokenizer).__name__}) is not a fast tokenizer; convert it first")
    return tokenizer


def _downloaded(name: str) -> Path:
    """Folder with the files of a Hub name; a path is never sent to the Hub."""
    parent = os.path.dirname(name)
    if not _HUB_NAME.fullmatch(name) or os.path.lexists(name) or (parent and os.path.isdir(parent)):
        raise ConfigError(
            f"tokenizer folder {excerpt(name)} {'is no folder' if os.path.lexists(name) else 'does not exist'}"
        )
    line = ""
    try:
        model_info(name, timeout=HUB_SECONDS)  # the download itself would wait for an answer without an end
    except Exception as error:  # of the library, or of its HTTP client
        line = str(error).strip().partition("\n")[0] or type(error).__name__
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=bool(line)))
    except (OSError, ValueError) as error:
        line = line or str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"tokenizer '{name}' is no folder, and no tokenizer of this name could be loaded from the Hub or from its "
            f"cache ({excerpt(line)}): name a folder, or run `hf download {name}` where there is a network"
        ) from None


def _check_files(folder: Path) -> None:
    """Check every file that a library may read before it reads one; raises OSError or ValueError."""
    for file in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        content = read_file(file, limits.TOKENIZER_BYTES)
        if file.suffix != ".json":
            continue
        try:
            _check_document(parse_json(content))
        except ValueError as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from None


def _names_code(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "auto_map" in read_json(settings)


def _check_document(tree: Any) -> None:
    """Raise ValueError for a document that a library might take for ever to read, or to apply."""
    if not isinstance(tree, dict):
        raise ValueError("it holds no JSON object")
    if depth_exceeds(tree, limits.TOKENIZER_DEPTH):
        raise ValueError(f"lists and objects are nested deeper than {limits.TOKENIZER_DEPTH} levels")
    growth = math.prod(_growths(tree.get("normalizer")))
    if growth > GROWTH:
        raise ValueError(f"its normalizer could make a text {growth:,} times as long, more than {GROWTH:,}")


def _growths(normalizer: Any) -> Iterator[int]:
    """Factor by which each replacement in a normalizer may lengthen a text."""
    if isinstance(normalizer, list):
        for item in normalizer:
            yield from _growths(item)
    elif isinstance(normalizer, dict):
        for value in normalizer.values():
            yield from _growths(value)
        content, pattern = normalizer.get("content"), normalizer.get("pattern")
        if isinstance(content, str):
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            yield max(math.ceil(len(content) / len(replaced)) if replaced else len(content) + 1, 1)


@contextmanager
def as_config_error(problem: str) -> Iterator[None]:
    """Turn any error of the libraries into one line: they raise many types, and a panic of Rust is no Exception."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, ConfigError) or not (isinstance(error, Exception) or is_panic):
            raise
        line = reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{problem}: {excerpt(line or type(error).__name__)}") from None
