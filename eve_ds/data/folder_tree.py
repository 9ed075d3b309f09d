"""All folders below a folder, through links: each once, whatever leads to it, so that no link makes a loop."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from eve_ds.data.sample_names import is_leftover

UNREADABLE, BROKEN = "unreadable folder", "broken link"


class Folder(NamedTuple):
    """A folder of a tree."""

    name: str
    """Path below the root, through links; empty for the root."""
    path: str
    """Real path."""
    within: str
    """Real path of the root, or of the folder to which a link leads, whichever it belongs to."""


class File(NamedTuple):
    """A file of a tree, which may be a link itself."""

    name: str
    """Path below the root, through links to folders."""
    path: str
    """Path in the real folder."""
    within: str
    """That of its folder."""


class FolderTree:
    """Folders below one or more roots.

    A folder is known by its device and its number there. One that links lead to beside its real place has that place;
    one that only links lead to has the path of the first link. Links to a folder above the root are not followed. What
    macOS wrote is left out.

    Args:
        roots: folders that exist.

    Attributes:
        folders: in the order of the roots, below each in the order of their paths.
        unread: path below the root, and reason, of each folder that cannot be read and of each link that leads
            nowhere and has no suffix, as that to a folder.
    """

    def __init__(self, *roots: Path) -> None:
        self.folders: list[Folder] = []
        self.unread: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()
        for root in roots:
            found = self._below(os.path.realpath(root))
            self.folders += sorted(found, key=lambda folder: PurePath(folder.name).parts)

    def files(self) -> Iterator[tuple[Folder, list[str]]]:
        """Folders with the names of their files in order; these are listed anew at every call."""
        for folder in self.folders:
            with os.scandir(folder.path) as entries:
                names = [entry.name for entry in entries if not (_is_folder(entry) or is_leftover(entry.name))]
            yield folder, sorted(names)

    def ending(self, *suffixes: str) -> list[File]:
        """Files with one of some suffixes, in the order of their paths."""
        found = [
            File(os.path.join(folder.name, name), os.path.join(folder.path, name), folder.within)
            for folder, names in self.files()
            for name in names
            if name.endswith(suffixes)
        ]
        return sorted(found, key=lambda file: PurePath(file.name).parts)

    def _below(self, root: str) -> list[Folder]:
        above = {_identity(str(parent)) for parent in Path(root).parents}
        found: list[Folder] = []
        links = [Folder("", root, root)]
        while links:
            starts, links = sorted(links), []
            for start in starts:
                if _identity(start.path) not in above:
                    links += self._real_below(start, found)
        return found

    def _real_below(self, start: Folder, found: list[Folder]) -> list[Folder]:
        """Add a folder and those below it to what is found; returns the folders to which links in them lead."""
        linked: list[Folder] = []
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            identity = _identity(folder.path)
            if identity not in self._seen:
                self._seen.add(identity)
                self._list(folder, found, waiting, linked)
        return linked

    def _list(self, folder: Folder, found: list[Folder], waiting: list[Folder], linked: list[Folder]) -> None:
        try:
            with os.scandir(folder.path) as entries:
                listed = [entry for entry in entries if not is_leftover(entry.name)]
        except OSError:
            self.unread.append((folder.name or ".", UNREADABLE))
            return
        found.append(folder)
        for entry in listed:
            name = os.path.join(folder.name, entry.name)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Folder(name, entry.path, folder.within))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                real = os.path.realpath(entry.path)
                linked.append(Folder(name, real, real))
            elif entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path):
                self.unread.append((name, BROKEN))


def contents_digest(files: Iterable[tuple[str, str]]) -> str:
    """Digest of the names and sizes of files, in their order; changes as files come, go or grow.

    Args:
        files: name and path of each.
    """
    digest = hashlib.sha256()
    for number, (name, path) in enumerate(files):
        line = f"{name} {_size(path)}" if number == 0 else f"\n{name} {_size(path)}"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size(path: str) -> int:
    """Bytes of a file; 0 where a link leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))
