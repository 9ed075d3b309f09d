"""Output of img2dataset: `webdataset` shards (tars) or `files` (numbered folders) of KEY.jpg, KEY.txt and KEY.json, or
`parquet` tables with the encoded images.

The importer lists tar headers; the worker reads captions, metadata and images at their offsets. Only files with the
same name up to the last dot are one sample: `a.0.jpg` belongs to `a.0.txt`, and to no other caption.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds import limits
from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.folder_tree import File, FolderTree, contents_digest
from eve_ds.data.formats.entries import Entry
from eve_ds.data.formats.images import PROBED_IMAGES
from eve_ds.data.formats.parquet import EMBEDDED_COLUMNS, SUFFIX, ParquetTable, column_names
from eve_ds.data.formats.spelling import is_number
from eve_ds.data.formats.tables import Columns
from eve_ds.data.formats.unread import binary_kind
from eve_ds.data.image_file import IMAGE_EXTENSIONS
from eve_ds.data.importers.annotated_images import counted
from eve_ds.data.importers.candidate import Candidate, FileSlice, InlineBytes, Skip, existing_folder
from eve_ds.data.sample_names import COMPRESSED, is_packed_tar, split_name
from eve_ds.data.tar_headers import Damage, block_reader, scan
from eve_ds.printable import excerpt
from eve_ds.reading import parse_json, read_file

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
TEXT, METADATA = ".txt", ".json"
ADDRESS, KEY = "url", "key"
"""Fields of the metadata, and columns of Parquet, with the address of an image and its number in the download."""
_DAMAGED = "damaged tar (members of it are lost)"


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
        metadata = self.read_metadata()
        caption = metadata.get("caption") if self.text is None else self.text.read()
        if not isinstance(caption, str | bytes):
            raise BadSample("no caption")
        image_id = self._image_id(metadata)
        is_local = self.id_field == KEY and is_number(image_id)
        return Candidate(self.name, self.image, (caption,), image_id, address_of(metadata), is_local=is_local)

    def _image_id(self, metadata: dict[str, Any]) -> str:
        try:
            return Entry(metadata, self.name).identity(self.id_field) or self.name
        except SourceError:
            raise BadSample("unreadable metadata", f"{self.id_field} is no id") from None

    def read_metadata(self) -> dict[str, Any]:
        """Fields of KEY.json, none without it; raises :class:`BadSample`."""
        if self.metadata is None:
            return {}
        try:
            metadata = parse_json(self.metadata.read())
        except ValueError as error:
            raise error if isinstance(error, BadSample) else BadSample("unreadable metadata") from None
        if not isinstance(metadata, dict):
            raise BadSample("unreadable metadata")
        return metadata


def address_of(metadata: dict[str, Any]) -> str | None:
    """Address that an image was downloaded from; None where the metadata have none."""
    address = metadata.get(ADDRESS)
    return address if isinstance(address, str) and address else None


class Img2dataset:
    """A folder that img2dataset wrote.

    Args:
        folder: the folder; links in it that lead to other folders are followed.
        id_field: field of the metadata that is the image id; None: the address, or the name where there is none.
        follow_links: whether links of single files may lead out of the folder.
    """

    def __init__(self, folder: str | Path, id_field: str | None = None, follow_links: bool = False) -> None:
        """Find the shards; raises :class:`SourceError` without any, or where no metadata have the field of ids."""
        self._folder = existing_folder(folder, "img2dataset folder")
        self._id_field, self._follow_links = id_field or ADDRESS, follow_links
        self._tree = FolderTree(self._folder)
        archives = self._tree.ending(".tar", *COMPRESSED)
        self._tars = [file for file in archives if file.name.endswith(".tar")]
        self._packed = [file.name for file in archives if is_packed_tar(Path(file.path))]
        has_images = self._tars or next(self._files(), None) is not None
        self._tables = [] if has_images else self._tables_with_images()
        self.total: int | None = None
        self.description: dict[str, Any] = {
            "format": "img2dataset",
            "path": str(self._folder),
            "id_field": self._id_field,
            "contents": contents_digest(self._contents()),
            **({"follow_links": True} if follow_links else {}),
        }
        if not self._tars and next(iter(self), None) is None:
            raise SourceError(f"{folder} holds neither .tar shards nor images; expected the output of img2dataset")
        if id_field is not None and not self._tables:
            self._require_field(id_field)

    def _require_field(self, field: str) -> None:
        """Raise :class:`SourceError` where the first samples have no such field: their ids would be their names."""
        samples = islice((item for item in self if isinstance(item, Img2datasetCandidate)), PROBED_IMAGES)
        fields: dict[str, None] = {}
        for sample in samples:
            with suppress(BadSample):
                fields |= dict.fromkeys(sample.read_metadata())
        if field not in fields:
            advice = f"name one of: {excerpt(', '.join(fields))}" if fields else "they have no fields: leave it out"
            raise SourceError(
                f"{self._folder}: --id_field ({field}) is no field of the metadata of its first images; {advice}"
            )

    def _tables_with_images(self) -> list[File]:
        """Tables of the format `parquet`; beside tars and files, tables hold the metadata only."""
        found = self._tree.ending(SUFFIX)
        return found if found and set(EMBEDDED_COLUMNS) & {*column_names(Path(found[0].path))} else []

    def _contents(self) -> Iterator[tuple[str, str]]:
        """Name and path of the tars, of the tables, or of all files that may belong to a sample."""
        files = self._tars or self._tables
        if files:
            yield from ((file.name, file.path) for file in files)
            return
        for folder, names in self._tree.files():
            below, real = os.path.join(folder.name, ""), os.path.join(folder.path, "")  # joined once, not for each file
            yield from ((below + name, real + name) for name in names if _is_of_sample(name))

    def __iter__(self) -> Iterator[Candidate | Img2datasetCandidate | Skip]:
        """Samples sorted by shard, then in the order of the shard; files sorted by name; what is not read last."""
        if not self._tars and not self._tables:
            yield from self._files()
        for table in self._tables:
            yield from self._table(Path(table.path), Path(table.name).with_suffix(""))
        for tar in self._tars:
            yield from self._tar(Path(tar.path), tar.name)
        for name in self._packed:
            yield Skip(name, "compressed tar: unpack it")
        for name, reason in self._tree.unread:
            yield Skip(name, reason)

    def _table(self, path: Path, name: Path) -> Iterator[Candidate | Skip]:
        table = ParquetTable(path, Columns(EMBEDDED_COLUMNS, "caption", self._id_field), ADDRESS)
        for number, record in enumerate(counted(iter(table))):
            if isinstance(record, Skip) or record.data is None:
                yield Skip(f"{name}/{number}", record.reason if isinstance(record, Skip) else "no image")
            elif not record.captions:
                yield Skip(f"{name}/{number}", "no caption")
            else:
                image_id = record.image_id or f"{name}/{number}"
                address = next(iter(record.aliases), None)
                yield Candidate(
                    name=f"{name}/{number}",
                    image=InlineBytes(record.data),
                    captions=record.captions,
                    image_id=image_id,
                    file=address,
                    is_local=self._id_field == KEY and is_number(image_id),
                )

    def _tar(self, path: Path, shard: str) -> Iterator[Img2datasetCandidate | Skip]:
        members, beside_damage = _list_tar(path)
        groups = [
            (key, stem, files) for key, group in groupby(members, key=_key) for stem, files in _parts(group).items()
        ]
        counts = Counter(stem for _, stem, _ in groups)
        for key, stem, files in groups:
            # Without its metadata a sample has no id, by which it may have to be left out.
            if key in beside_damage and METADATA not in dict(files):
                yield Skip(f"{shard}/{stem}", "broken tar entry")
            else:
                yield self._sample(f"{shard}/{stem}", files, divided=counts[stem] > 1)
        if beside_damage:
            yield Skip(shard, _DAMAGED if members else _without_members(path))

    def _files(self) -> Iterator[Img2datasetCandidate | Skip]:
        for folder, names in self._tree.files():
            slices = [
                (name, FileSlice(f"{folder.path}/{name}", 0, None, _most(name), folder.within, self._follow_links))
                for name in sorted(names, key=_key_then_name)
                if split_name(name)[0] is not None
            ]
            for stem, files in _parts(slices).items():
                # KEY_stats.json and KEY.parquet beside the images describe a whole folder: they are no samples.
                if any(suffix in (*IMAGE_SUFFIXES, TEXT) for suffix, _ in files):
                    yield self._sample(os.path.join(folder.name, stem), files)

    def _sample(
        self, name: str, files: Sequence[tuple[str, FileSlice]], divided: bool = False
    ) -> Img2datasetCandidate | Skip:
        """Candidate of the files of one sample; `divided`: there are more of them elsewhere in the tar."""
        by_suffix = dict(files)
        if len(by_suffix) < len(files):
            return Skip(name, "duplicate member")
        image = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
        if divided and (image is None or not by_suffix.keys() & {TEXT, METADATA}):
            return Skip(name, "members of a sample must stand together in the tar")
        if image is None:
            return Skip(name, "no image")
        return Img2datasetCandidate(name, image, by_suffix.get(TEXT), by_suffix.get(METADATA), self._id_field)


def _key(member: tuple[str, FileSlice]) -> str | None:
    return split_name(member[0])[0]


def _is_of_sample(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, TEXT, METADATA)) and split_name(name)[0] is not None


def _key_then_name(name: str) -> tuple[str, str]:
    return str(split_name(name)[0]), name


def _parts(members: Iterable[tuple[str, FileSlice]]) -> dict[str, list[tuple[str, FileSlice]]]:
    """Files with image, text or metadata by their name up to the last dot; each with its suffix in lower case."""
    parts: dict[str, list[tuple[str, FileSlice]]] = {}
    for name, file in members:
        path = PurePosixPath(name)
        if path.suffix.lower() in (*IMAGE_SUFFIXES, TEXT, METADATA):
            parts.setdefault(str(path.with_suffix("")), []).append((path.suffix.lower(), file))
    return parts


def _most(name: str) -> int:
    return limits.METADATA_BYTES if name.lower().endswith((TEXT, METADATA)) else limits.IMAGE_BYTES


def _without_members(path: Path) -> str:
    """Why a file with the name of a tar has no members."""
    try:
        kind = binary_kind(read_file(path, limits.MIB, size=16))
    except OSError:
        kind = None
    return _DAMAGED if kind is None else f"no tar but {kind[0]}: {kind[1]}"


def _list_tar(path: Path) -> tuple[list[tuple[str, FileSlice]], set[str | None]]:
    """Names and places of the members that are data, and the keys before and behind damage, None for no key."""
    members: list[tuple[str, FileSlice]] = []
    beside_damage: set[str | None] = set()
    after_damage = False
    try:
        with path.open("rb", buffering=0) as file:
            for found in scan(block_reader(file.fileno()), os.fstat(file.fileno()).st_size):
                if isinstance(found, Damage):
                    after_damage = True
                    beside_damage.add(_key(members[-1]) if members else None)
                elif split_name(found.name)[0] is not None:
                    place = FileSlice(str(path), found.end - found.size, found.size, _most(found.name))
                    members.append((found.name, place))
                    if after_damage:
                        beside_damage.add(_key(members[-1]))
                        after_damage = False
    except OSError:
        beside_damage.add(None)
    return members, beside_damage
