"""NLVR2 (Suhr et al., ACL 2019): JSON lines of statements about two photographs.

`{identifier, sentence, label, directory}`; `label` and `directory` may be absent. The identifier `SPLIT-SET-PAIR-N`
names the images `SPLIT-SET-PAIR-img0.png` (left) and `SPLIT-SET-PAIR-img1.png` (right).
"""

from __future__ import annotations

from typing import NamedTuple

from eve_ds.data.formats.entries import Entry


class Statement(NamedTuple):
    """One statement about two images."""

    identifier: str
    sentence: str
    label: bool | None
    """Whether the statement is true; None in a test set."""
    images: tuple[tuple[str, ...], tuple[str, ...]]
    """Left and right: paths below the image folder where the image may lie, in the order in which they are tried."""


def statement(entry: Entry) -> Statement:
    """Record of an entry; raises :class:`SourceError` for a field that is missing or malformed."""
    identifier = entry.text("identifier")
    stem = identifier.rpartition("-")[0]
    folder = None if entry.get("directory") is None else str(entry.get("directory"))
    left, right = (_places(folder, f"{stem}-img{side}.png") for side in (0, 1))
    return Statement(identifier, entry.text("sentence"), entry.label(), (left, right))


def _places(folder: str | None, name: str) -> tuple[str, ...]:
    return (name,) if folder is None else (f"{folder}/{name}", name)
