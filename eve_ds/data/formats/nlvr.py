"""NLVR 1.0 (Suhr et al., ACL 2017) in its published layout, as a folder or as a tar archive of any compression.

`SPLIT/SPLIT.json` holds one JSON object a line with `sentence`, `label`, `identifier` (N-M) and `directory`; the image
`SPLIT/images/DIRECTORY/SPLIT-N-M-K.png` shows permutation K (0 to 5) of three boxes, so a sentence that is true of one
permutation is true of all six. Images are 400x100 RGBA with an opaque alpha channel.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from eve_ds import limits
from eve_ds.data.errors import SourceError
from eve_ds.data.folder_tree import FolderTree
from eve_ds.data.formats.entries import Entry
from eve_ds.data.formats.json_stream import read_outline
from eve_ds.data.formats.unread import refuse_document
from eve_ds.data.sample_names import is_leftover
from eve_ds.reading import parse_json, read_file

_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""First bytes of a compressed file -> function that opens it."""
PERMUTATIONS = 6
IMAGE_NAME = re.compile(r"(?P<split>[A-Za-z]\w*)-(?P<identifier>\d+-\d+)-[0-5]\.png")
LAYOUT = "expected SPLIT/SPLIT.json beside SPLIT/images/DIRECTORY/SPLIT-N-M-K.png"


class Statement(NamedTuple):
    """One sentence about six images."""

    split: str
    identifier: str
    """`N-M`; N is shared by the statements with the same sentence."""
    sentence: str
    label: bool | None
    """Whether the sentence is true; None where it is not published."""

    @property
    def image_names(self) -> tuple[str, ...]:
        """Names of the six images, without suffix."""
        return tuple(f"{self.split}-{self.identifier}-{k}" for k in range(PERMUTATIONS))


def read_statements(data: bytes, split: str, path: Path) -> Iterator[Statement]:
    """Statements of one annotation file.

    Args:
        data: content of the file.
        split: the split that it belongs to.
        path: folder or archive, for messages.

    Raises:
        SourceError: a line is not an NLVR example, or two have the same identifier, which names their images.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {split}.json"
        try:
            entry = Entry(parse_json(line), where)
            identifier = entry.text("identifier")
            if seen.setdefault(identifier, number) != number:
                raise entry.error(f"identifier {identifier} is that of line {seen[identifier]} too")
            yield Statement(split, identifier, entry.text("sentence"), entry.label())
        except ValueError as error:  # SourceError of the entry, or no JSON
            raise SourceError(
                f"{path}: {where} is not an NLVR example; expected one JSON object a line with sentence, label, "
                f"identifier ({error})"
            ) from None


def folder_splits(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of annotation file and image folder of the splits at, below, or two levels below the folder.

    A file that links lead to as well is taken once, at its real place if that is in the folder.
    """
    found = [path for pattern in ("*.json", "*/*.json", "*/*/*.json") for path in folder.glob(pattern)]
    files: dict[Path, Path] = {}
    for path in sorted(found, key=lambda path: (path.resolve() != path, path)):
        files.setdefault(path.resolve(), path)
    return [(path, path.parent / "images") for path in sorted(files.values()) if (path.parent / "images").is_dir()]


def image_tree(splits: Iterable[tuple[Path, Path]]) -> FolderTree:
    """Folders of the images of splits, which may share them; the images end in `.png`."""
    return FolderTree(*dict.fromkeys(images for _, images in splits))


def annotated_split(path: PurePosixPath) -> str | None:
    """Split whose annotations a file has by its place in the layout; None for other files."""
    return path.stem if path.suffix == ".json" and path.parent.name in {path.stem, ""} else None


def image_split(name: PurePosixPath) -> str | None:
    """Split whose image a file is by its name; None for other files."""
    match = IMAGE_NAME.fullmatch(name.name)
    return match["split"] if match else None


class Unpacked:
    """Unpacked bytes of an archive of any compression, up to a multiple of its size.

    Headers are capped as well as members: :mod:`tarfile` reads both at any size that they claim.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(6)
        opener = next((function for magic, function in _DECOMPRESSORS.items() if start.startswith(magic)), open)
        self._file: IO[bytes] = opener(path, "rb")  # type: ignore[operator]
        self._path, self._left = path, max(limits.ARCHIVE_RATIO * path.stat().st_size, limits.ARCHIVE_SMALL_BYTES)

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; raises :class:`SourceError` where the archive unpacks to too many."""
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(
                f"{self._path} unpacks to more than {limits.ARCHIVE_RATIO} times its size: it is no archive of images"
            )
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _opened(unpacked: Unpacked) -> tarfile.TarFile:
    return tarfile.open(fileobj=unpacked, mode="r|")  # type: ignore[call-overload]


def refuse_json(path: Path) -> None:
    """Raise :class:`SourceError` for a file of annotations where an archive is expected."""
    if read_file(path, limits.MIB, size=64).lstrip()[:1] not in (b"{", b"["):
        return
    tree = read_outline(path).tree
    refuse_document(path, tree if isinstance(tree, list) else [tree], "nlvr")
    raise SourceError(f"{path} is JSON, not an archive or a folder with images; {LAYOUT}")


def archive_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Files of an archive in order, read as a stream, without those of macOS.

    Raises:
        SourceError: the archive is damaged, or unpacks to far more than its own size.
    """
    read = 0
    try:
        with closing(Unpacked(path)) as unpacked, _opened(unpacked) as archive:
            for member in archive:
                # The holes of a sparse file would be filled in memory.
                plain = member.isfile() and not member.issparse() and not is_leftover(member.name)
                file = archive.extractfile(member) if plain else None
                if file is not None:
                    read += 1
                    yield PurePosixPath(member.name), file.read()
    except SourceError:
        raise
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        if read:
            raise SourceError(f"{path} is damaged after {read} files ({error}); get it again") from None
        raise SourceError(f"{path} is not a tar archive ({error}); {LAYOUT}") from None


class Corpus(NamedTuple):
    """Statements and images of a folder or an archive."""

    statements: list[Statement]
    images: dict[str, Path | bytes]
    """Name without suffix -> path of the file in a folder, or content of the member of an archive."""


def read_corpus(path: Path, split: str | None) -> Corpus:
    """Statements and images of one split, or of all.

    Images of an archive are held in memory; those of a folder are not read.

    Raises:
        SourceError: a damaged archive, a malformed line, or no annotations of the split.
    """
    corpus = Corpus([], {})
    for name, content in _folder_files(path) if path.is_dir() else archive_members(path):
        annotated = annotated_split(name)
        if annotated is not None and split in (None, annotated):
            data = read_file(content, limits.ANNOTATION_BYTES) if isinstance(content, Path) else content
            corpus.statements.extend(read_statements(data, annotated, path))
        elif (shown := image_split(name)) is not None and split in (None, shown):
            corpus.images[name.stem] = content
    if not corpus.statements:
        raise SourceError(f"{path} has no SPLIT.json{f' of split {split}' if split else ''}: it is not NLVR's layout")
    return corpus


def _folder_files(folder: Path) -> Iterator[tuple[PurePosixPath, Path | bytes]]:
    """Annotations of all splits of a folder, then the images."""
    splits = folder_splits(folder)
    for sentences, _ in splits:
        yield PurePosixPath(sentences.relative_to(folder)), sentences
    for image in image_tree(splits).ending(".png"):
        yield PurePosixPath(image.name), Path(image.path)
