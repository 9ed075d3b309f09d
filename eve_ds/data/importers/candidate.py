"""Candidates that importers hand to the shard writer; only the worker that writes a candidate reads its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eve_ds.data.errors import BadSample, SourceError


class Readable(Protocol):
    """Bytes that are fetched on demand."""

    def read(self) -> bytes:
        """The bytes; raises :class:`BadSample`."""


@dataclass(frozen=True)
class FileSlice:
    """A whole file, or `size` bytes of it from `offset` (a member of an uncompressed tar)."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the slice; raises :class:`BadSample` for a file that is missing, unreadable or too short."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read() if self.size is None else file.read(self.size)
        except FileNotFoundError:
            raise BadSample("missing file") from None
        except (OSError, ValueError):  # ValueError: a NUL byte in the path
            raise BadSample("unreadable file") from None
        if self.size is not None and len(data) < self.size:
            raise BadSample("broken tar entry")
        return data


@dataclass(frozen=True)
class InlineBytes:
    """Bytes that were read already, such as those of a compressed archive, which can only be read in order."""

    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class Skip:
    """A sample that the importer leaves out and the report counts."""

    name: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One image with its captions.

    Attributes:
        name: name of the image in the source, for reports.
        image: encoded bytes of the image.
        captions: text, or bytes that are not yet known to be UTF-8; one sample is written per caption.
        image_id: written to `ids.txt`; the `ids.txt` of a test set keeps its images out of training.
        aliases: further names by which a list of excluded ids may call the image.
    """

    name: str
    image: Readable
    captions: tuple[str | bytes, ...]
    image_id: str
    aliases: tuple[str, ...] = ()

    @property
    def num_captions(self) -> int:
        """Number of samples that the candidate becomes at most."""
        return len(self.captions)

    def resolve(self) -> Candidate:
        """The candidate itself, as everything but the image is known."""
        return self


class LazyCandidate(Protocol):
    """A candidate whose captions or id must be read first; a :class:`Candidate` needs no reading."""

    @property
    def name(self) -> str:
        """Name of the image in the source."""

    @property
    def num_captions(self) -> int:
        """Number of samples that the candidate becomes at most."""

    def resolve(self) -> Candidate:
        """The candidate with captions and id; raises :class:`BadSample` if they cannot be read."""


class Source(Protocol):
    """A data set that yields the same candidates in the same order at every iteration."""

    description: dict[str, Any]
    """Identity of the source, as JSON types; only a source with an equal identity continues an unfinished folder."""
    total: int | None
    """Expected number of candidates, or None; for progress only, may become known during iteration."""

    def __iter__(self) -> Iterator[LazyCandidate | Skip]: ...


def existing(path: str | Path, what: str) -> Path:
    """Absolute path of a file or folder that must exist; raises :class:`SourceError` with `what` as its name."""
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise SourceError(f"{what} {path} does not exist: check the path")
    return resolved


def existing_folder(path: str | Path, what: str) -> Path:
    """Absolute path of a folder that must exist; raises :class:`SourceError`."""
    resolved = existing(path, what)
    if not resolved.is_dir():
        raise SourceError(f"{what} {path} is not a folder: check the path")
    return resolved


def existing_file(path: str | Path, what: str) -> Path:
    """Absolute path of a file that must exist; raises :class:`SourceError`."""
    resolved = existing(path, what)
    if not resolved.is_file():
        raise SourceError(f"{what} {path} is not a file: check the path")
    return resolved
