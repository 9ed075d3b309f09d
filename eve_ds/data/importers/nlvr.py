"""NLVR 1.0 (Suhr et al., ACL 2017) in its published layout, as a folder or as tar archives of any compression.

`SPLIT/SPLIT.json` holds one JSON object a line with `sentence`, `label`, `identifier` (N-M) and `directory`; the image
`SPLIT/images/DIRECTORY/SPLIT-N-M-K.png` shows permutation K (0 to 5) of the three boxes, so a sentence that is true of
one is true of all six. Sentences labelled true are the captions; the others have none and are counted as skipped.
Images are 400x100 RGBA with an opaque alpha channel and keep their bytes.
"""

from __future__ import annotations

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.importers.candidate import Candidate, FileSlice, InlineBytes, Readable, Skip, SourceError, existing

PERMUTATIONS = 6
IMAGE_NAME = re.compile(r"(?P<split>[A-Za-z]\w*)-(?P<identifier>\d+-\d+)-[0-5]\.png")
LAYOUT = "expected SPLIT/SPLIT.json beside SPLIT/images/DIRECTORY/SPLIT-N-M-K.png"


@dataclass
class Annotations:
    """Sentences of one split."""

    captions: dict[str, str | None] = field(default_factory=dict)
    """By identifier; None where the sentence is labelled false."""
    missing: dict[str, None] = field(default_factory=dict)
    """Images of true sentences that have not been seen yet, in the order of the file."""


class Nlvr:
    """Images of one or more splits with the sentences that are true of them."""

    def __init__(self, paths: Sequence[str | Path], splits: Sequence[str] | None = None) -> None:
        """Check that annotations are found; raises :class:`SourceError`.

        Args:
            paths: archives, or folders that hold `SPLIT` folders or are one.
            splits: which splits to take; None takes all.
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
        """Images in archive order, or sorted by path; images that are missing come last."""
        self._annotations, self.total = {}, 0
        for path in self._paths:
            yield from self._folder(path) if path.is_dir() else self._archive(path)
        for split in self._annotations.values():
            for name in split.missing:
                yield Skip(name, "missing file")

    def _check_layout(self, path: Path) -> None:
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
                self._read_annotations(annotation_path.stem, annotation_path.read_bytes(), annotation_path)
                for image in sorted(image_folder.rglob("*.png")):
                    yield from self._image(image.stem, FileSlice(str(image)))

    def _archive(self, path: Path) -> Iterator[Candidate | Skip]:
        # Published archives have the annotations before the images. Images that come earlier are held until then.
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
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                entry = json.loads(line)
                identifier, true = entry["identifier"], entry["label"] == "true"
                annotations.captions[identifier] = entry["sentence"] if true else None
            except (ValueError, KeyError, TypeError):
                raise SourceError(
                    f"{path}: line {number} of {split}.json is not an NLVR example; expected one JSON object a line "
                    "with sentence, label, identifier"
                ) from None
            if true:
                annotations.missing |= {f"{split}-{identifier}-{k}": None for k in range(PERMUTATIONS)}
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
            yield Skip(image_name, "sentence labelled false")
        else:
            yield Candidate(image_name, image, (caption,), image_name)


def folder_splits(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of annotation file and image folder of the splits at, below, or two levels below the folder."""
    found = [path for pattern in ("*.json", "*/*.json", "*/*/*.json") for path in folder.glob(pattern)]
    return [(path, path.parent / "images") for path in sorted(found) if (path.parent / "images").is_dir()]


def annotated_split(path: PurePosixPath) -> str | None:
    """Split whose annotations a file has by its place in the layout; None for other files."""
    return path.stem if path.suffix == ".json" and path.parent.name in {path.stem, ""} else None


def _folder_names(folder: Path) -> Iterator[str]:
    return (annotations.stem for annotations, _ in folder_splits(folder))


def _archive_names(path: Path) -> Iterator[str]:
    return (split for name, _ in archive_members(path) if (split := annotated_split(name)) is not None)


def archive_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of an archive in order, read as a stream; raises :class:`SourceError` where it is damaged."""
    read = 0
    try:
        with tarfile.open(path, mode="r|*") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    read += 1
                    yield PurePosixPath(member.name), file.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if read:
            raise SourceError(f"{path} is damaged after {read} files ({error}); get it again") from None
        raise SourceError(f"{path} is not a tar archive ({error}); {LAYOUT}") from None
