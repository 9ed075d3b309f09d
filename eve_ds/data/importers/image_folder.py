"""The folder below which annotations name images; what lies outside is not read, whatever the annotations say."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from eve_ds.data.formats.images import is_file
from eve_ds.data.formats.spelling import normal_path
from eve_ds.data.importers.candidate import FileSlice


@dataclass(frozen=True)
class ImageFolder:
    """Paths of annotations, as files of a folder.

    Attributes:
        root: absolute path of the folder.
        strip_prefix: start of the paths that belongs to the machine where they were written; removed.
        follow_links: whether symbolic links may lead out of the folder.
    """

    root: Path
    strip_prefix: str | None = None
    follow_links: bool = False

    def spelling(self, path: str) -> str:
        """The one spelling of an annotated path below the folder, in which paths are compared; see :meth:`name`."""
        return unicodedata.normalize("NFC", self._below(normal_path(path)))

    def name(self, path: str) -> str:
        """Path below the folder of the file that an annotated path means.

        A file of Linux may have a backslash in its name. Names of macOS have their accents apart (NFD), those of others
        do not (NFC).
        """
        plain = self._below(normal_path(path))
        if path.isascii() and "\\" not in path:
            return plain
        forms = (path, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD")))
        return next((form for form in forms if is_file(self.root / form)), plain)

    def has(self, name: str) -> bool:
        """Whether a name is that of a file."""
        return is_file(self.root / name)

    def image(self, name: str) -> FileSlice:
        """The image file of a name; an absolute one is read if it lies in the folder."""
        return FileSlice(str(self.root / name), folder=str(self.root), follow_links=self.follow_links)

    def _below(self, path: str) -> str:
        """A path without the prefix, or without the folder where it names that in full."""
        starts = [normal_path(start) for start in (self.strip_prefix, str(self.root)) if start is not None]
        start = next((start for start in starts if path.startswith(f"{start.rstrip('/')}/")), None)
        return path if start is None else normal_path(path[len(start.rstrip("/")) + 1 :])
