"""NLVR 1.0 as a source of image-caption pairs: images with the sentences that are true of them.

Sentences labeled true are the captions; images of the others have none and are counted as skipped. Images keep their
bytes. The layout is described in :mod:`eve_ds.data.formats.nlvr`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.formats.nlvr import (
    IMAGE_NAME,
    LAYOUT,
    annotated_split,
    archive_members,
    folder_images,
    folder_splits,
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

    def __init__(self, paths: Sequence[str | Path], splits: Sequence[str] | None = None) -> None:
        """Check that every path has annotations; raises :class:`SourceError` for one that has none.

        Args:
            paths: archives, or folders that hold `SPLIT` folders or are one.
            splits: names of the splits to read; None reads all.
        """
        self._paths = [existing(path, "source") for path in paths]
        self._splits = None if splits is None else frozenset(splits)
        self._annotations: dict[str, Annotations] = {}
        self.total: int | None = None
        self.description: dict[str, Any] = {
            "format": "nlvr",
            "paths": [
                {"path": str(path), "bytes": path.stat().st_size if path.is_file() else None} for path in self._paths
            ],
            "splits": None if splits is None else sorted(splits),
        }
        for path in self._paths:
            self._check_layout(path)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Images in the order of the archive, or sorted by path; missing images come last."""
        self._annotations, self.total = {}, 0
        for path in self._paths:
            yield from self._folder(path) if path.is_dir() else self._archive(path)
        for split in self._annotations.values():
            for name in split.missing:
                yield Skip(name, "missing file")

    def _check_layout(self, path: Path) -> None:
        if path.is_file():
            refuse_json(path)
        found: set[str] = set()
        for split in _folder_names(path) if path.is_dir() else _archive_names(path):
            if self._wanted(split):
                return
            found.add(split)
        if found:
            raise SourceError(
                f"{path} has no split {' or '.join(sorted(self._splits or ()))}; it has: {', '.join(sorted(found))}"
            )
        raise SourceError(f"{path} is not in the NLVR layout: {LAYOUT}")

    def _folder(self, folder: Path) -> Iterator[Candidate | Skip]:
        for annotation_path, image_folder in folder_splits(folder):
            if self._wanted(annotation_path.stem):
                self._read_annotations(
                    annotation_path.stem, read_file(annotation_path, limits.ANNOTATION_BYTES), annotation_path
                )
                for image in folder_images(image_folder):
                    yield from self._image(image.stem, FileSlice(str(image), folder=str(folder)))

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


def _folder_names(folder: Path) -> Iterator[str]:
    return (annotations.stem for annotations, _ in folder_splits(folder))


def _archive_names(path: Path) -> Iterator[str]:
    return (split for name, _ in archive_members(path) if (split := annotated_split(name)) is not None)
