"""The folder below which annotations name images; what lies outside is not read, whatever the annotations say."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from eve_ds.data.formats.images import is_file
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

    def name(self, path: str) -> str:
        """Path below the folder that an annotated path means.

        A path of Windows has backslashes. Names of macOS have their accents apart (NFD), those of others do not (NFC).
        """
        if self.strip_prefix is not None:
            prefix = f"{_slashes(self.strip_prefix).rstrip('/')}/"
            path = _slashes(path)[len(prefix) :].lstrip("/") if _slashes(path).startswith(prefix) else path
        if path.isascii() and "\\" not in path:
            return path
        plain = _slashes(path)
        forms = (path, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD")))
        return next((form for form in forms if is_file(self.root / form)), plain)

    def has(self, name: str) -> bool:
        """Whether a name is that of a file."""
        return is_file(self.root / name)

    def image(self, name: str) -> FileSlice:
        """The image file of a name; an absolute one is read if it lies in the folder."""
        return FileSlice(str(self.root / name), folder=str(self.root), follow_links=self.follow_links)


def _slashes(path: str) -> str:
    return path.replace("\\", "/")
