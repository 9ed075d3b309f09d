"""Names of images: how sources call an image and how lists of ids call it, so that a test set can be left out.

A source knows an image by an id, a path or an address, and sometimes by its number in another data set. COCO's images
are numbered. Half of Visual Genome's are images of COCO. Those of Flickr30K and SBU come from Flickr, as do all of COCO
and Visual Genome, and their addresses hold the number of the photograph.

:func:`image_names` gives all names of an image, :func:`listed_names` all names that a line of a list can mean. An image
is listed if the two have a name in common. Two paths name one image if one of them is the end of the other: `a/1.jpg`
is `1.jpg` and `data/a/1.jpg`, and is not `b/1.jpg`.

A name is a string with its kind in front:

- `COCO 9`, `VG 9`, `Flickr 9`: a number in COCO, Visual Genome or Flickr
- `address http://host/a.jpg`
- `id x`, `number 9`: an id; `number` for one that counts the entries of its own file
- `file a/b.jpg`: the whole path of an image, and every end of a path in a list
- `tail b.jpg`: every end of the path of an image, with and without the suffix, and the whole path in a list
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice

from eve_ds.data.formats.spelling import (
    is_address,
    is_image_name,
    is_number,
    is_plain_number,
    normal_address,
    normal_path,
    one_line,
    whole_number,
    without_suffix,
    without_zeros,
)

MOST_PARTS = 32
"""Parts of the ends of a path at most, beside the whole."""
_NUMBERED = re.compile(r"(?P<set>COCO|VG|Flickr)_(?P<number>[0-9]+)")
_COCO_FILE = re.compile(r"(?:COCO_[a-z]+[0-9]{4}_)?(?P<number>000000[0-9]{6})")
_VG_FOLDERS = ("VG_100K", "VG_100K_2")
_FLICKR = re.compile(r"https?://[^/?#]*flickr\.com/(?:[^/?#]+/)*(?P<number>[0-9]+)_[0-9a-f]+[^/]*", re.IGNORECASE)
_FLICKR_FILE = re.compile(r"(?P<number>[0-9]+)_[0-9a-f]{10}(?:_[0-9a-z]+)?")
_LONG_NUMBER = re.compile(r"[1-9][0-9]{7,}")
"""A file that such a number names is a photograph of Flickr: numbers of COCO and Visual Genome are shorter."""


def in_data_set(name: str, number: str | None) -> tuple[str, ...]:
    """Text that calls an image by its number in "COCO", "VG" or "Flickr"; empty for what is no number."""
    return (f"{name}_{number}",) if number is not None and is_number(number) else ()


def image_names(image_id: str, file: str | None, aliases: Iterable[str] = (), is_local: bool = False) -> frozenset[str]:
    """All names of an image.

    Args:
        image_id: its id, which may be a path or an address.
        file: path of its file, or its address; None where there is none.
        aliases: further paths, addresses, and texts of :func:`in_data_set`.
        is_local: whether the id counts the entries of its own file.
    """
    names = {name for text in aliases for name in _called(one_line(text))}
    if file is not None:
        names.update(_called(one_line(file), is_file=True))
    image_id = whole_number(one_line(image_id))
    return frozenset(names | ({f"number {image_id}"} if is_local else {*_called(image_id)}))


def listed_names(line: str) -> frozenset[str]:
    """All names that a line of a list can mean: an id, a path, an address, or several of one image behind tabs.

    A text without the suffix of an image that stands alone may be an id, a stem, or a number of COCO or Flickr; one
    beside others is an id only.
    """
    texts = line.split("\t")
    return frozenset(name for text in texts for name in _meant(whole_number(text), is_alone=len(texts) == 1))


def id_line(image_id: str, file: str | None, aliases: Iterable[str] = (), is_local: bool = False) -> str:
    """Line of ids.txt for an image, with the arguments of :func:`image_names`: its names with tabs between them.

    They are its id, its file where the id is not made of it, and its numbers in other data sets that these do not hold.
    """
    image_id = one_line(image_id)
    texts = [image_id]
    if file is not None:
        file = one_line(file)
        stem = without_suffix(file.rpartition("/")[2])
        is_known = image_id == file or (image_id == stem and not is_plain_number(stem))
        texts = [image_id] if is_known else [file] if is_local else [image_id, file]
    known = {name for text in texts for name in _shared_names(text)}
    others = dict.fromkeys(name for text in aliases for name in _shared_names(one_line(text)))
    return "\t".join((*texts, *(name.replace(" ", "_") for name in others if name not in known)))


def _read(text: str) -> tuple[list[str], str | None]:
    """Names that a text holds by its form, and its path; an address is a name and has no path."""
    shared = list(_shared_names(text))
    if is_address(text):
        return [*shared, f"address {normal_address(text)}"], None
    return shared, normal_path(text).lstrip("/")


def _called(text: str, is_file: bool = False) -> Iterator[str]:
    """Names of an image that a source calls by a text; `is_file`: a file even without the suffix of one."""
    shared, path = _read(text)
    yield from shared
    if path is None:
        return
    if not (is_file or is_image_name(path)):
        yield f"id {path}"
        return
    yield f"file {path}"
    for tail in _tails(path):
        yield f"tail {tail}"
        stem = without_suffix(tail)
        if not (is_number(stem) and _is_of_visual_genome(shared)):  # 9 is no name of VG_100K/9.jpg
            yield f"tail {stem}"


def _meant(text: str, is_alone: bool) -> Iterator[str]:
    """Names that a text of a list can mean."""
    shared, path = _read(text)
    yield from shared
    if path is None:
        return
    stem = without_suffix(path)
    if stem == path or not is_number(stem):
        yield f"id {stem}"
    if stem != path:
        yield f"tail {path}"
        yield from (f"file {tail}" for tail in _tails(path) if "/" in tail or not _is_of_visual_genome(shared))
        if is_plain_number(stem):
            yield f"Flickr {stem}"
    elif is_alone:
        yield f"tail {path}"
        if is_number(path):
            yield f"number {path}"
        if is_plain_number(path):
            yield from (f"COCO {path}", f"Flickr {path}")


def _shared_names(text: str) -> Iterator[str]:
    """Numbers in COCO, Visual Genome and Flickr that a text holds by its form."""
    path = normal_path(text.partition("?")[0] if is_address(text) else text)
    folder, _, last = path.rpartition("/")
    folder, stem = folder.rpartition("/")[2], without_suffix(last)
    if found := _NUMBERED.fullmatch(text):
        yield f"{found['set']} {without_zeros(found['number'])}"
        return
    if folder in _VG_FOLDERS and is_number(stem):
        yield f"VG {without_zeros(stem)}"
        return
    if found := _COCO_FILE.fullmatch(stem):
        yield f"COCO {without_zeros(found['number'])}"
    if number := _flickr_number(text, folder, stem, is_file=stem != last):
        yield f"Flickr {without_zeros(number)}"


def _flickr_number(text: str, folder: str, stem: str, is_file: bool) -> str | None:
    found = _FLICKR.fullmatch(text) if is_address(text) else _FLICKR_FILE.fullmatch(stem)
    if found:
        return found["number"]
    in_folder = folder.lower().startswith("flickr") and is_number(stem)
    return stem if is_file and (in_folder or (not is_address(text) and _LONG_NUMBER.fullmatch(stem))) else None


def _is_of_visual_genome(shared: Iterable[str]) -> bool:
    return any(name.startswith("VG ") for name in shared)


def _tails(path: str) -> Iterator[str]:
    """The ends of a path, from its last part to the whole."""
    tails = accumulate(reversed(path.split("/")), lambda tail, part: f"{part}/{tail}")
    return chain(islice(tails, MOST_PARTS), [path] if path.count("/") >= MOST_PARTS else [])
