"""Names of shards and of their members: which files are data, and how a name divides into key and extension."""

from __future__ import annotations

import re
from pathlib import Path

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
COMPRESSED = (".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".zst", ".lz4", ".zip", ".7z")
"""Suffixes of compressed files, in which no sample can be read at its offset."""
TOGETHER = "members of a sample, as KEY.jpg and KEY.txt, must stand together in a shard, without a dot in KEY"
"""Rule of the names of members, for messages."""
_PACKED_TAR = re.compile(r".*[.]t.*z.*", re.DOTALL)
_CAPTION_OF_IMAGE = re.compile(r"((?:.*/)?[0-9]{9,})-[0-9]+", re.DOTALL)
_CAPTION = re.compile(r"(?:([0-9]+)\.)?txt")
_RESERVED = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str | None, str | None]:
    """Key and extension of a member by the rule of `webdataset`: the key ends at the first dot of the last part.

    Both are None for a member that is no data: without a key or a dot, reserved by `webdataset` (`__meta__`), or
    written by macOS.
    """
    match = None if _RESERVED.match(name) or is_leftover(name) else _KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2]) if match else (None, None)


def caption_label(extension: str) -> str | None:
    """Number of a caption in the extension of its member: "3" for `3.txt`, "" for `txt`; None for no caption."""
    match = _CAPTION.fullmatch(extension.lower())
    return None if match is None else match[1] or ""


def written_key(image: int, caption: int | None) -> str:
    """Key that `prepare` writes: number of the image in its source, and of the caption if the image has several."""
    return f"{image:09d}" if caption is None else f"{image:09d}-{caption}"


def image_key(key: str) -> str:
    """Key without the number of the caption, if it is one of :func:`written_key`: the same for all of an image."""
    match = _CAPTION_OF_IMAGE.fullmatch(key)
    return match[1] if match else key


def is_leftover(name: str) -> bool:
    """Whether macOS wrote a file beside those of the user: `._NAME`, `.DS_Store`, or anything below `__MACOSX`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]  # a PurePosixPath takes several times as long
    return bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store" or "__MACOSX" in parts)


def shard_files(folder: Path) -> list[Path]:
    """Tars of a folder in the order of their names, without those of macOS."""
    return sorted(path for path in folder.glob("*.tar") if not is_leftover(path.name))


def packed_tars(folder: Path) -> list[Path]:
    """Compressed tars of a folder that were not unpacked, in the order of their names."""
    return sorted(filter(is_packed_tar, folder.glob("*")))


def is_packed_tar(path: Path) -> bool:
    """Whether a file is a compressed tar by its name (`*.t*z*`), and was not unpacked: no plain tar is beside it."""
    if path.suffix.lower() not in COMPRESSED or is_leftover(path.name) or not _PACKED_TAR.fullmatch(path.name):
        return False
    return not path.with_suffix("" if path.stem.endswith(".tar") else ".tar").exists()
