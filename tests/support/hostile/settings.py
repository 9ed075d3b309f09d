"""Hostile configurations: YAML and JSON that a user was given, and values on the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from eve_ds.config import load_config
from hostile.case import BIGINT, DEEP, Case, endless, pipe, sparse, write


def _file(content: bytes | str, folder: Path, _: Path, name: str = "a.yaml") -> None:
    load_config(str(write(folder / name, content)))


def _override(text: str, folder: Path, _: Path) -> None:
    load_config("eve_tiny", [text])


def _circle(folder: Path, _: Path) -> None:
    write(folder / "a.yaml", f"base: {folder}/b.yaml\n")
    load_config(str(write(folder / "b.yaml", f"base: {folder}/a.yaml\n")))


def _itself_by_links(folder: Path, _: Path) -> None:
    """A file that extends itself under a new name each time, through a link to its folder."""
    (folder / "l").symlink_to(folder)
    write(folder / "a.yaml", f"base: {folder}/l/a.yaml\n")
    load_config(f"{folder}/a.yaml")


ALIASES = "a: &a [1]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join([f'*{chr(97 + level)}'] * 9)}]\n" for level in range(20)
)
CASES = {
    "aliases that multiply": Case(partial(_file, ALIASES), "more than 10,000 values, aliases expanded"),
    "aliases in JSON": Case(partial(_file, ALIASES, name="a.json"), "more than 10,000 values"),
    "deep YAML": Case(partial(_file, DEEP), "nested deeper than 100 levels"),
    "a bigint": Case(partial(_file, b"train: {seed: " + BIGINT + b"}"), "a number has 100,000 digits, more than 300"),
    "not UTF-8": Case(partial(_file, b"name: \xff\xfe"), "a.yaml cannot be read: 'utf-8' codec can't decode"),
    "an object": Case(partial(_file, "!!python/object/apply:os.system ['true']"), "could not determine a constructor"),
    "a module": Case(partial(_file, "!!python/module:canary"), "could not determine a constructor"),
    "a key twice": Case(
        partial(_file, "train: {seed: 1}\ntrain: {seed: 2}"), r"'train' stands twice \(line 2, column 1"
    ),
    "a forged line": Case(
        partial(_file, '"x\\n12:00:00 INFO saved": 1'), r"unknown key 'x\\n12:00:00 INFO saved'; known:"
    ),
    "a base in a circle": Case(_circle, "base leads in a circle, or too far"),
    "a base through links": Case(_itself_by_links, "base leads in a circle, or too far"),
    "a pipe": Case(lambda folder, _: load_config(str(pipe(folder / "a.yaml"))), "not a regular file"),
    "a device": Case(lambda folder, _: load_config(str(endless(folder / "a.yaml"))), "not a regular file"),
    "a terabyte": Case(lambda folder, _: load_config(str(sparse(folder / "a.yaml", 2**40))), "bytes, more than"),
    "a deep value": Case(partial(_override, "a.b=" + "[" * 50_000), "nested deeper than 100 levels"),
    "a deep key": Case(partial(_override, ".".join("a" * 50_000) + "=1"), "49999 sections: no key lies that deep"),
    "a value of a megabyte": Case(
        partial(_override, "train.seed='" + "x" * 10**6 + "'"), r"train\.seed \('x{299} \.\.\.\)"
    ),
    "not a number": Case(partial(_override, "optimizer.lr=.nan"), "Input should be a finite number"),
    "a seed beyond 64 bits": Case(
        partial(_override, f"train.seed={2**64}"), "train.seed .* less than 9223372036854775808"
    ),
}
