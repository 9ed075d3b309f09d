"""Output of img2dataset: `webdataset` shards (tars) or `files` (numbered folders) of KEY.jpg, KEY.txt and KEY.json.

The importer lists tar headers; the worker reads captions, metadata and images at their offsets.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.importers.candidate import Candidate, FileSlice, Skip, existing_folder

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Img2datasetCandidate:
    """One sample whose caption and metadata are not read yet."""

    name: str
    image: FileSlice
    text: FileSlice | None
    metadata: FileSlice | None
    id_field: str
    num_captions: int = 1

    def resolve(self) -> Candidate:
        """Read caption and id; raises :class:`BadSample` without a caption, or for metadata that cannot be read."""
        metadata = self._metadata()
        caption = metadata.get("caption") if self.text is None else self.text.read()
        if not isinstance(caption, str | bytes):
            raise BadSample("no caption")
        return Candidate(self.name, self.image, (caption,), str(metadata.get(self.id_field) or self.name))

    def _metadata(self) -> dict[str, Any]:
        if self.metadata is None:
            return {}
        try:
            metadata = json.loads(self.metadata.read())
        except ValueError as error:
            raise error if isinstance(error, BadSample) else BadSample("unreadable metadata") from None
        if not isinstance(metadata, dict):
            raise BadSample("unreadable metadata")
        return metadata


class Img2dataset:
    """A folder that img2dataset wrote; the metadata field `id_field` is the image id (default: the URL)."""

    def __init__(self, folder: str | Path, id_field: str = "url") -> None:
        """Find the shards; raises :class:`SourceError` for a folder with neither tars nor images."""
        self._folder = existing_folder(folder, "img2dataset folder")
        self._id_field = id_field
        self._tars = sorted(self._folder.rglob("*.tar"))
        self.total: int | None = None
        self.description: dict[str, Any] = {"format": "img2dataset", "path": str(self._folder), "id_field": id_field}
        if not self._tars and next(iter(self), None) is None:
            raise SourceError(f"{folder} holds neither .tar shards nor images; expected the output of img2dataset")

    def __iter__(self) -> Iterator[Img2datasetCandidate | Skip]:
        """Samples sorted by shard, then in the order of the shard; files sorted by name."""
        if not self._tars:
            yield from self._files()
        for path in self._tars:
            shard = str(path.relative_to(self._folder))
            members, damaged = _list_tar(path)
            for key, group in groupby(members, key=lambda member: _key(member[0])):
                yield from self._sample(f"{shard}/{key}", group)
            if damaged:
                yield Skip(shard, "broken tar (rest of it lost)")

    def _files(self) -> Iterator[Img2datasetCandidate | Skip]:
        for folder, subfolders, names in os.walk(self._folder):
            subfolders.sort()
            where = Path(folder).relative_to(self._folder)
            for key, members in groupby(sorted(names, key=_key_then_name), key=_key):
                slices = [(name, FileSlice(os.path.join(folder, name))) for name in members]
                # KEY_stats.json and KEY.parquet beside the images describe a whole folder: they are no samples.
                if any(name.lower().endswith((*IMAGE_SUFFIXES, ".txt")) for name, _ in slices):
                    yield from self._sample(str(where / key), slices)

    def _sample(self, name: str, members: Iterable[tuple[str, FileSlice]]) -> Iterator[Img2datasetCandidate | Skip]:
        by_suffix = {PurePosixPath(member).suffix.lower(): file for member, file in members}
        image = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
        if image is None:
            yield Skip(name, "no image")
        else:
            yield Img2datasetCandidate(name, image, by_suffix.get(".txt"), by_suffix.get(".json"), self._id_field)


def _key(name: str) -> str:
    """The WebDataset key: the path up to the first dot of its last part."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _key_then_name(name: str) -> tuple[str, str]:
    return _key(name), name


def _list_tar(path: Path) -> tuple[list[tuple[str, FileSlice]], bool]:
    """Names and offsets of the members up to the end or the first damage, and whether the tar is damaged."""
    members = []
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    members.append((member.name, FileSlice(str(path), member.offset_data, member.size)))
            # tarfile stops without an error at a header that it cannot read; an intact archive ends with zeros.
            with path.open("rb") as file:
                file.seek(archive.offset)
                return members, any(file.read(tarfile.BLOCKSIZE))
    except (tarfile.TarError, OSError):
        return members, True
