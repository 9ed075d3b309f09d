"""Load configurations from presets, files and overrides; report each problem in one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eve_ds import limits
from eve_ds.config.data import SourceConfig, ValidationConfig
from eve_ds.config.model import FORMER_PIXEL_TARGET
from eve_ds.config.section import ConfigError, Section
from eve_ds.config.task import TaskConfig
from eve_ds.config.tree import Config
from eve_ds.config.yaml_text import parse_yaml
from eve_ds.printable import excerpt, without_credentials
from eve_ds.reading import read_file
from eve_ds.storage import cause

REMOVED_KEYS: dict[str, dict[str, Any]] = {"task": {"word_passes": 0, "read_states": False}}
"""Section -> removed keys with their former default, which configurations of earlier runs still contain."""


def presets() -> list[str]:
    """Names of the presets shipped in `eve_ds/configs`, sorted; task recipes are named `tasks/NAME`."""
    folder = resources.files("eve_ds") / "configs"
    found = [("", item) for item in folder.iterdir()] + [("tasks/", item) for item in (folder / "tasks").iterdir()]
    return sorted(prefix + item.name.removesuffix(".yaml") for prefix, item in found if item.name.endswith(".yaml"))


def load_config(preset_or_path: str, overrides: list[str] | None = None, under: dict[str, Any] | None = None) -> Config:
    """Read a preset by name or a YAML file by path, apply overrides, and validate the result.

    Args:
        preset_or_path: name of a preset, or path of a YAML file. A file may name the preset or file that it extends
            under the key `base`.
        overrides: strings `section.key=value`; each value is parsed as YAML. A mapping keeps the keys that it does not
            name, as the mappings of a file do.
        under: tree that supplies every key which neither the file nor an override sets.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown key (the message suggests the nearest name), or a value
            that breaks a rule.
    """
    tree = _merge(under or {}, _read_tree(preset_or_path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, preset_or_path)


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dictionary.

    Raises:
        ConfigError: all problems in one line, separated by semicolons; `where` names the source of the tree.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(item, where) for item in error.errors())) from None


def parse_written_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a configuration that a run of this or of an earlier version wrote.

    Keys that this version removed are dropped if they hold their former default.

    Raises:
        ConfigError: see :func:`parse_config`; or a removed key holds another value than its former default.
    """
    if not isinstance(tree, dict):
        return parse_config(tree, where)
    tree = {name: _without_removed(name, section, where) for name, section in tree.items()}
    model = tree.get("model")
    if isinstance(model, dict):
        former: dict[str, Any] = {"pixel_target": FORMER_PIXEL_TARGET}
        if "objectives" not in model:
            former["objective"] = "msm"  # the only objective before the field existed
        tree = tree | {"model": former | model}
    return parse_config(tree, where)


def _without_removed(name: str, section: Any, where: str) -> Any:
    """Return the section without removed keys; raise ConfigError if one of them had an effect."""
    removed = REMOVED_KEYS.get(name, {})
    if not isinstance(section, dict):
        return section
    for key, default in removed.items():
        if section.get(key, default) != default:
            raise ConfigError(
                f"{where}: {name}.{key} ({section[key]!r}) was removed, and only {default!r} can still be read: "
                "use the version that wrote it"
            )
    return {key: value for key, value in section.items() if key not in removed}


def _read_tree(preset_or_path: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tree of a preset or file on top of that of its `base`; `extended_by` names the configurations that extend it."""
    chain = (*extended_by, preset_or_path)
    if len(chain) > limits.CONFIG_BASES:
        shown = " -> ".join(chain[:4]) + (" -> ..." if len(chain) > 4 else "")
        raise ConfigError(f"config {chain[0]}: base leads in a circle, or too far: {shown}")
    tree = _parse_yaml(_read_text(preset_or_path), f"config {preset_or_path}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"config {preset_or_path} must be a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"config {preset_or_path}: base ({excerpt(repr(base))}) must be the name of a preset or file")
    return _merge(_read_tree(base, chain), tree)


def _read_text(preset_or_path: str) -> str:
    path = Path(preset_or_path)
    if preset_or_path in presets() and not os.path.isfile(path):
        return (resources.files("eve_ds") / "configs" / f"{preset_or_path}.yaml").read_text(encoding="utf-8")
    if path.suffix not in {".yaml", ".yml", ".json"} and not (os.path.exists(path) and not os.path.isdir(path)):
        raise ConfigError(
            f"config '{excerpt(preset_or_path)}' is neither a file nor a preset"
            f"{nearest(preset_or_path, presets())}; presets: {', '.join(presets())}"
        )
    try:
        return read_file(path, limits.CONFIG_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"config file {preset_or_path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {preset_or_path} cannot be read: {cause(error)}") from None


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set a key of a tree; sections on the way are copied, since the tree may share them with others."""
    path, separator, text = override.partition("=")
    shown = excerpt(f"{path}=..." if "://" in text else override)  # an address may hold a password
    if not separator:
        raise ConfigError(f"override '{shown}' must have the form section.key=value")
    *sections, key = path.strip().split(".")
    if len(sections) > limits.JSON_DEPTH:
        raise ConfigError(f"override '{shown}' has {len(sections)} sections: no key lies that deep")
    for section in sections:
        inner = tree.get(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override '{shown}': '{section}' is a value, not a section")
        tree[section] = dict(inner)
        tree = tree[section]
    try:
        value = {key: _parse_yaml(text, f"override '{shown}'")}
    except ConfigError as error:
        if not set("[{") & set(text):
            raise
        raise ConfigError(
            f"{error}; put the whole override in single quotes for the shell, and a path with {{, }} or ? in double "
            "quotes inside them"
        ) from None
    tree.update(_merge(tree, value))  # as in a file: a mapping changes the keys that it names


def _problem(error: Any, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        unknown = f"{where}: unknown key '{excerpt('.'.join(location))}'"
        elsewhere = next(_places(location[-1], Config), None)
        if elsewhere is not None:
            return f"{unknown}; did you mean '{elsewhere}'?"
        return unknown + nearest(location[-1], _known_keys(location[:-1]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("model_type", "dict_type"):
        message = f"Input should be a mapping of {', '.join(_known_keys(location))}, such as {{KEY: VALUE, ...}}"
    place = ".".join(location)
    if error["type"] == "value_error":  # its message names keys of the section, with their values
        return ": ".join(part for part in (where, place, message) if part)
    return f"{where}: {place} ({excerpt(repr(_shown(error['input'])))}): {message}"


def _shown(value: Any) -> Any:
    """Value of a setting with its addresses as messages show them."""
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _known_keys(location: list[str]) -> list[str]:
    section: Any = Config
    for part in location:
        if part.isdigit():
            continue
        field = section.model_fields[part].annotation
        section = {"sources": SourceConfig, "task": TaskConfig, "validation": ValidationConfig}.get(part, field)
    return list(section.model_fields)


def _places(name: str, section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a section, and of the sections in it, whose last part is `name`."""
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _places(name, field.annotation, f"{prefix}{key}.")
        elif key == name and prefix:
            yield f"{prefix}{key}"


def nearest(name: str, known: list[str]) -> str:
    """End of a message about an unknown name: the nearest known name, or all of them."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(sorted(known))}"
