"""NLVR 1.0 as a source of image-caption pairs: images with the sentences that are true of them.

Sentences labeled true are the captions; images of the others have none and are counted as skipped. Images keep their
bytes. The layout is described in :mod:`eve_ds.data.formats.nlvr`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.folder_tree import contents_digest
from eve_ds.data.formats.nlvr import (
    IMAGE_NAME,
    LAYOUT,
    annotated_split,
    archive_members,
    folder_splits,
    image_tree,
    read_statements,
    refuse_json,
)
from eve_ds.data.importers.candidate import Candidate, FileSlice, InlineBytes, Readable, Skip, existing
from eve_ds.reading import read_file


@dataclass
class Annotations:
    """Sentences of one split, by identifier."""

    captions: dict[str, str | None] = field(default_factory=dict)
    """Identifier -> sentence; None where the sentence is labeled false."""
    missing: dict[str, None] = field(default_factory=dict)
    """Names of images of true sentences that are still to come, in the order of the file."""


class Nlvr:
    """Images of one or more splits, each with the sentence that is true of it."""

    def __init__(
        self, paths: Sequence[str | Path], splits: Sequence[str] | None = None, follow_links: bool = False
    ) -> None:
        """Check that every path has annotations; raises :class:`SourceError` for one that has none.

        Args:
            paths: archives, or folders that hold `SPLIT` folders or are one; links to folders are followed.
            splits: names of the splits to read, each of which some path must have; None reads all.
            follow_links: whether links of single images may lead out of the folder of images.
        """
        self._paths = [existing(path, "source") for path in paths]
        self._splits = None if splits is None else frozenset(splits)
        self._follow_links = follow_links
        self._annotations: dict[str, Annotations] = {}
        self.total: int | None = None
        self._check_layout()
        self.description: dict[str, Any] = {
            "format": "nlvr",
            "paths": [{"path": str(path), **self._contents(path)} for path in self._paths],
            "splits": None if splits is None else sorted(splits),
            **({"follow_links": True} if follow_links else {}),
        }

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Images in the order of the archive, or sorted by path; missing images come last."""
        self._annotations, self.total = {}, 0
        for path in self._paths:
            yield from self._folder(path) if path.is_dir() else self._archive(path)
        for split in self._annotations.values():
            for name in split.missing:
                yield Skip(name, "missing file")

    def _check_layout(self) -> None:
        missing = set(self._splits or ())
        found: set[str] = set()
        for path in self._paths:
            if path.is_file():
                refuse_json(path)
            here = self._splits_of(path, missing)
            if not here:
                raise SourceError(f"{path} is not in the NLVR layout: {LAYOUT}")
            if not any(map(self._wanted, here)):
                raise _lacks(str(path), self._splits or (), here)
            missing -= here
            found |= here
        if missing:
            raise _lacks(" + ".join(map(str, self._paths)), missing, found)

    def _splits_of(self, path: Path, missing: set[str]) -> set[str]:
        """Names of splits of a path, up to the last that is missing: an archive is read no further."""
        found: set[str] = set()
        for split in _folder_names(path) if path.is_dir() else _archive_names(path):
            found.add(split)
            if missing <= found and self._wanted(split):
                break
        return found

    def _contents(self, path: Path) -> dict[str, Any]:
        """What tells that an archive or a folder is another than before."""
        if path.is_file():
            return {"bytes": path.stat().st_size}
        splits = self._folder_splits(path)
        files = [(str(annotations.relative_to(path)), str(annotations)) for annotations, _ in splits]
        files += [(image.name, image.path) for image in image_tree(splits).ending(".png")]
        return {"contents": contents_digest(files)}

    def _folder_splits(self, folder: Path) -> list[tuple[Path, Path]]:
        return [split for split in folder_splits(folder) if self._wanted(split[0].stem)]

    def _folder(self, folder: Path) -> Iterator[Candidate | Skip]:
        splits = self._folder_splits(folder)
        for path, _ in splits:
            self._read_annotations(path.stem, read_file(path, limits.ANNOTATION_BYTES), path)
        images = image_tree(splits)
        for image in images.ending(".png"):
            file = FileSlice(image.path, folder=image.within, follow_links=self._follow_links)
            yield from self._image(Path(image.name).stem, file)
        yield from (Skip(name, reason) for name, reason in images.unread)

    def _archive(self, path: Path) -> Iterator[Candidate | Skip]:
        # Published archives hold the annotations before the images. Images that come earlier are kept until then.
        early: list[tuple[str, bytes]] = []
        for name, data in archive_members(path):
            split = annotated_split(name)
            if split and self._wanted(split):
                self._read_annotations(split, data, path)
                for image_name, image in early:
                    yield from self._image(image_name, InlineBytes(image))
                early = [(image_name, image) for image_name, image in early if self._split_of(image_name) != split]
            elif self._split_of(name.stem) in self._annotations:
                yield from self._image(name.stem, InlineBytes(data))
            elif self._split_of(name.stem) is not None:
                early.append((name.stem, data))
        for image_name, _ in early:
            yield Skip(image_name, "no annotation")

    def _wanted(self, split: str) -> bool:
        return self._splits is None or split in self._splits

    def _split_of(self, image_name: str) -> str | None:
        match = IMAGE_NAME.fullmatch(f"{image_name}.png")
        return match["split"] if match and self._wanted(match["split"]) else None

    def _read_annotations(self, split: str, data: bytes, path: Path) -> None:
        annotations = Annotations()
        for statement in read_statements(data, split, path):
            if statement.label is None:
                raise SourceError(
                    f"{path}: sentence {statement.identifier} of {split}.json has no label, which decides whether it "
                    "is a caption: take a split that publishes labels"
                )
            annotations.captions[statement.identifier] = statement.sentence if statement.label else None
            if statement.label:
                annotations.missing |= dict.fromkeys(statement.image_names)
        self._annotations[split] = annotations
        self.total = (self.total or 0) + len(annotations.missing)

    def _image(self, image_name: str, image: Readable) -> Iterator[Candidate | Skip]:
        match = IMAGE_NAME.fullmatch(f"{image_name}.png")
        split = self._annotations.get(match["split"]) if match else None
        if match is None or split is None:
            return
        if match["identifier"] not in split.captions:
            yield Skip(image_name, "no annotation")
            return
        caption = split.captions[match["identifier"]]
        split.missing.pop(image_name, None)
        if caption is None:
            yield Skip(image_name, "sentence labeled false")
        else:
            yield Candidate(image_name, image, (caption,), image_name)


def _lacks(where: str, splits: Iterable[str], found: Iterable[str]) -> SourceError:
    return SourceError(f"{where} has no split {' or '.join(sorted(splits))}; it has: {', '.join(sorted(found))}")


def _folder_names(folder: Path) -> Iterator[str]:
    return (annotations.stem for annotations, _ in folder_splits(folder))


def _archive_names(path: Path) -> Iterator[str]:
    return (split for name, _ in archive_members(path) if (split := annotated_split(name)) is not None)
