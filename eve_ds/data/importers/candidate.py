"""What an importer hands to the shard writer: candidates whose bytes are read only by the worker that writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eve_ds.data.errors import BadSample, SourceError


class Readable(Protocol):
    """Bytes that are fetched when asked for."""

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
    """Bytes already read, as from a compressed archive, which can only be read in order."""

    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class Skip:
    """A sample that the importer itself leaves out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """One image with its captions.

    Attributes:
        name: what the source calls it, for reports.
        image: its encoded bytes.
        captions: text, or UTF-8 bytes that nobody has checked yet; one sample is written per caption.
        image_id: written to `ids.txt`; a test set's `ids.txt` keeps its images out of training.
        aliases: further names that exclude the image.
    """

    name: str
    image: Readable
    captions: tuple[str | bytes, ...]
    image_id: str
    aliases: tuple[str, ...] = ()

    @property
    def num_captions(self) -> int:
        """Samples that it can become."""
        return len(self.captions)

    def resolve(self) -> Candidate:
        """Itself: everything but the image is known."""
        return self


class LazyCandidate(Protocol):
    """A candidate whose captions or id must be read first; :class:`Candidate` is one that is ready."""

    @property
    def name(self) -> str:
        """What the source calls it."""

    @property
    def num_captions(self) -> int:
        """Samples that it can become."""

    def resolve(self) -> Candidate:
        """The candidate with captions and id; raises :class:`BadSample`."""


class Source(Protocol):
    """A data set: the same candidates in the same order at every iteration."""

    description: dict[str, Any]
    """What makes it this source, as JSON; a half-written output folder is continued only by an equal one."""
    total: int | None
    """Candidates to expect where that is known; for progress only, may become known while iterating."""

    def __iter__(self) -> Iterator[LazyCandidate | Skip]: ...


def existing(path: str | Path, what: str) -> Path:
    """The absolute path of something that must exist; raises :class:`SourceError`."""
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise SourceError(f"{what} {path} does not exist")
    return resolved


def existing_folder(path: str | Path, what: str) -> Path:
    """The absolute path of a folder that must exist; raises :class:`SourceError`."""
    resolved = existing(path, what)
    if not resolved.is_dir():
        raise SourceError(f"{what} {path} is not a folder")
    return resolved


def existing_file(path: str | Path, what: str) -> Path:
    """The absolute path of a file that must exist; raises :class:`SourceError`."""
    resolved = existing(path, what)
    if not resolved.is_file():
        raise SourceError(f"{what} {path} is not a file")
    return resolved
