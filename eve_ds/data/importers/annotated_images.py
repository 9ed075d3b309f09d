"""Images of a folder that annotation files describe, whatever the format of these.

Captions of one image share its bytes in a shard. They are found wherever they stand if the files have at most
`limits.GROUPED_BYTES` together; in larger files, and in tables with images, only if they stand together, so that the
memory does not grow. Spellings of one path (:meth:`ImageFolder.spelling`) are one image. Captions that are not UTF-8
keep their bytes as surrogates; the shard writer finds and counts them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from eve_ds import limits
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.coco import published_places
from eve_ds.data.formats.entries import Entry
from eve_ds.data.formats.images import require_some_image, spread
from eve_ds.data.formats.spelling import is_image_name, is_plain_number
from eve_ds.data.formats.tables import MALFORMED, NO_CAPTION, Row
from eve_ds.data.importers.candidate import (
    Candidate,
    FileSlice,
    InlineBytes,
    Readable,
    Skip,
    existing_file,
    existing_folder,
)
from eve_ds.data.importers.grouping import group_adjacent, group_all
from eve_ds.data.importers.image_folder import ImageFolder
from eve_ds.data.importers.region import Region


class ImagePaths(NamedTuple):
    """How annotated paths become files.

    Attributes:
        folder: folder of the images; None: that of the first annotation file.
        strip_prefix: start of the paths that belongs to the machine where they were written; removed.
        follow_links: whether symbolic links may lead out of the folder.
    """

    folder: str | Path | None = None
    strip_prefix: str | None = None
    follow_links: bool = False


BESIDE = ImagePaths()
"""Images beside the annotations."""


class AnnotatedImages(ABC):
    """Source of the images of one or more annotation files; a format is a subclass that reads its records.

    Args:
        format_name: name of the format, for the description.
        files: annotation files.
        paths: rules of paths.
        options: further options that determine the records, for the description.
        has_groups: whether an entry of the format holds all captions of its image.
        has_local_ids: whether ids that are numbers count the entries of their own file.
    """

    def __init__(
        self,
        format_name: str,
        files: Sequence[str | Path],
        paths: ImagePaths,
        options: dict[str, Any] | None = None,
        has_groups: bool = False,
        has_local_ids: bool = False,
    ) -> None:
        self.files = [existing_file(path, "annotation file") for path in files]
        folder = self.files[0].parent if paths.folder is None else existing_folder(paths.folder, "image folder")
        self._images = ImageFolder(folder, paths.strip_prefix, paths.follow_links)
        self._groups_all = not has_groups and fits_memory(self.files)
        self._has_local_ids = has_local_ids
        self.total: int | None = None
        rules = {"strip_prefix": paths.strip_prefix, "follow_links": paths.follow_links}
        self.description: dict[str, Any] = {
            "format": format_name,
            "annotations": [{"path": str(path), "sha256": sha256_of(path)} for path in self.files],
            "images": str(folder),
            **{key: value for key, value in rules.items() if value},
            **(options or {}),
        }

    @abstractmethod
    def records(self) -> Iterator[ImageCaptions | Skip]:
        """Records in the order of the files."""

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Images in the order of their first caption."""
        records: Sequence[ImageCaptions | Skip] | Iterator[ImageCaptions | Skip]
        if self._groups_all:
            records = group_all(self.records(), self._images.spelling)
            self.total = len(records)
        else:
            records = group_adjacent(self.records(), self._images.spelling)
        return map(self._candidate, records)

    def require_some_image(self) -> None:
        """Raise :class:`SourceError` where none of some images exists, which are spread over the records.

        Records that hold their images themselves have none to look for; the first one decides for all of the source.
        """
        usable = (record for record in self.records() if isinstance(record, ImageCaptions))
        first = next(usable, None)
        if first is None or first.data is not None:
            return
        named = (record for record in chain([first], usable) if record.data is None)
        paths = (Path(self._image(record)[1].path) for record in spread(named))
        advice = "--images, or remove the start of their paths with --strip_prefix"
        others = _places(first)[1:]
        if others:
            advice += f"; the folder may also hold it as {', '.join(others)}"
        require_some_image(paths, self.files[0], advice)

    def _candidate(self, record: ImageCaptions | Skip) -> Candidate | Skip:
        if isinstance(record, Skip):
            return record
        if not record.captions:
            return Skip(record.image, NO_CAPTION)
        name, file = self._image(record)
        image: Readable = file if record.box is None else Region(file, record.box)
        if record.data is not None:
            image = InlineBytes(record.data)
        path = self._images.spelling(record.image)
        has_path = record.data is None or is_image_name(path)  # not a row of Parquet
        return Candidate(
            name=name,
            image=image,
            captions=record.captions,
            image_id=path if record.image_id is None else record.image_id,
            file=path if has_path else None,
            aliases=record.aliases,
            is_local=self._has_local_ids and record.image_id is not None and is_plain_number(record.image_id),
        )

    def _image(self, record: ImageCaptions) -> tuple[str, FileSlice]:
        """Path below the folder and file of a record; the first that exists of several places."""
        names = [self._images.name(path) for path in _places(record)]
        name = names[0] if len(names) == 1 else next(filter(self._images.has, names), names[0])
        return name, self._images.image(name)


def _places(record: ImageCaptions) -> list[str]:
    """Paths below the image folder where the file of a record may lie."""
    return list(dict.fromkeys((record.image, *record.other_places, *published_places(record.image))))


def counted(records: Iterable[ImageCaptions | Row | Entry]) -> Iterator[ImageCaptions | Skip]:
    """Records of a format, with rows and entries that cannot be used as what the report counts."""
    for record in records:
        if isinstance(record, Entry):
            yield Skip(_with_problem(PurePosixPath(record.where).name, record.problem), MALFORMED)
        elif isinstance(record, Row):
            yield Skip(_with_problem(f"row {record.number}", record.detail), record.problem)
        else:
            yield record


def _with_problem(name: str, problem: str) -> str:
    return f"{name}: {problem}" if problem else name


def fits_memory(files: Sequence[Path]) -> bool:
    """Whether the captions of files are grouped in memory."""
    return sum(path.stat().st_size for path in files) <= limits.GROUPED_BYTES


def sha256_of(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
