"""Candidates that importers hand to the shard writer; only the worker that writes a candidate reads its bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from eve_ds import limits
from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.folder_tree import FolderTree
from eve_ds.data.formats.image_ids import id_line, image_names
from eve_ds.reading import read_file

ANNOTATION_SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
"""Suffixes of files that a message suggests in place of their folder."""

_REASONS = {errno.EINVAL: "not a regular file", errno.ENXIO: "not a regular file", errno.EOVERFLOW: "too large a file"}
"""Reasons of errors of :func:`eve_ds.reading.read_file`; ENXIO: a socket."""


class Readable(Protocol):
    """Bytes that are fetched on demand."""

    def read(self) -> bytes:
        """The bytes; raises :class:`BadSample`."""


@dataclass(frozen=True)
class FileSlice:
    """A whole file, or `size` bytes of it from `offset` (a member of an uncompressed tar).

    Attributes:
        path: absolute path of the file.
        offset: first byte.
        size: number of bytes; None: all.
        most: largest number of bytes that are read.
        folder: absolute path of the folder that the file must lie in; None: it may lie anywhere.
        follow_links: whether a symbolic link may lead out of the folder.
    """

    path: str
    offset: int = 0
    size: int | None = None
    most: int = limits.IMAGE_BYTES
    folder: str | None = None
    follow_links: bool = False

    def read(self) -> bytes:
        """Read the slice.

        Raises:
            BadSample: the file is missing, outside its folder, behind a link out of it, not regular, too large, too
                short or unreadable.
        """
        try:
            self._require_inside()
            data = read_file(self.path, self.most, self.offset, self.size)
        except FileNotFoundError:
            raise BadSample("missing file") from None
        except OSError as error:
            raise BadSample(_REASONS.get(error.errno or 0, "unreadable file")) from None
        except ValueError as error:  # a NUL byte or a lone surrogate in the path
            raise error if isinstance(error, BadSample) else BadSample("unreadable file") from None
        if self.size is not None and len(data) < self.size:
            raise BadSample("broken tar entry")
        return data

    def _require_inside(self) -> None:
        if self.folder is None:
            return
        written = Path(os.path.normpath(self.path)).is_relative_to(self.folder)
        real = Path(os.path.realpath(self.path)).is_relative_to(self.folder)
        if not (written if self.follow_links else real):
            link = "link out of the image folder (--follow_links follows it)"
            raise BadSample(link if written else "path outside the image folder")


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
        image_id: id of the image, stored with it; the `ids.txt` of a test set keeps its images out of training.
        file: path of the image below the image folder, or its address; None where it has none.
        aliases: further paths, addresses and numbers of the image; see
            :func:`eve_ds.data.formats.image_ids.image_names`.
        is_local: whether the id only counts the entries of its file.
    """

    name: str
    image: Readable
    captions: tuple[str | bytes, ...]
    image_id: str
    file: str | None = None
    aliases: tuple[str, ...] = ()
    is_local: bool = False

    @property
    def num_captions(self) -> int:
        """Number of samples that the candidate becomes at most."""
        return len(self.captions)

    def resolve(self) -> Candidate:
        """The candidate itself, as everything but the image is known."""
        return self

    def names(self) -> frozenset[str]:
        """All names by which a list can call the image."""
        return image_names(self.image_id, self.file, self.aliases, self.is_local)

    def id_line(self) -> str:
        """Line of `ids.txt`."""
        return id_line(self.image_id, self.file, self.aliases, self.is_local)


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
    """Absolute path of a file that must exist; raises :class:`SourceError`.

    A link keeps its own name and folder: its suffix says the format, and images lie beside it.
    """
    resolved = existing(path, what)
    if resolved.is_dir():
        raise SourceError(f"{what} {path} is not a file but a folder: give files{_files_of(resolved, Path(path))}")
    if not resolved.is_file():
        raise SourceError(f"{what} {path} is not a file: check the path")
    return Path(path).parent.resolve() / Path(path).name


def _files_of(folder: Path, shown: Path) -> str:
    """The pattern of the first annotation file below a folder, for a message."""
    names = [PurePath(file.name) for file in FolderTree(folder).ending(*ANNOTATION_SUFFIXES)]
    return f", as {shown / names[0].parent}/*{names[0].suffix}" if names else ""
