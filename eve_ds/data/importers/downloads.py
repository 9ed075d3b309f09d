"""Images of a folder that img2dataset filled, found by the address that each was downloaded from."""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np

from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.importers.candidate import FileSlice
from eve_ds.data.importers.img2dataset import Img2dataset, Img2datasetCandidate, address_of


class Downloads:
    """Index of the images; it takes about 60 bytes of memory for each, so that that of CC12M fits into 700 MB.

    Args:
        folder: output of img2dataset, as tars or files with the metadata of each image.
        follow_links: whether links of single files may lead out of the folder.

    Attributes:
        description: identity of the folder, as JSON types.

    Raises:
        SourceError: the folder has no images, or no metadata with addresses.
    """

    def __init__(self, folder: str | Path, follow_links: bool = False) -> None:
        self._root, self._follow_links = Path(folder).resolve(), follow_links
        source = Img2dataset(folder, follow_links=follow_links)
        self._trees: list[str | None] = []
        self.description = source.description
        hashes, self._ends, self._places = array("Q"), array("Q", [0]), bytearray()
        for item in source:
            if not isinstance(item, Img2datasetCandidate) or (address := _address(item)) is None:
                continue
            hashes.append(_hash(address))
            self._places += self._written(item.image)
            self._ends.append(len(self._places))
        if not hashes:
            raise SourceError(
                f"{folder} has no metadata (KEY.json) with the addresses of its images: give an output of img2dataset "
                "in tars or files (`prepare.py img2dataset` reads one in Parquet, with its own captions)"
            )
        self._order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable").astype(np.uint32)
        self._hashes = np.frombuffer(hashes, np.uint64)[self._order]

    def __len__(self) -> int:
        """Number of images with an address."""
        return len(self._hashes)

    def __contains__(self, address: str) -> bool:
        """Whether the image of an address is there."""
        return self._place(address) is not None

    def __getitem__(self, address: str) -> FileSlice:
        """Image of an address, the first of several; raises KeyError for one that is not there."""
        at = self._place(address)
        if at is None:
            raise KeyError(address)
        number = int(self._order[at])
        return self._read(bytes(self._places[self._ends[number] : self._ends[number + 1]]))

    def _place(self, address: str) -> int | None:
        wanted = np.uint64(_hash(address))
        at = int(self._hashes.searchsorted(wanted))
        return at if at < len(self._hashes) and self._hashes[at] == wanted else None

    def _written(self, image: FileSlice) -> bytes:
        """Place of an image as text: number of its tree, and for a member of a tar also offset and size; path."""
        path = Path(image.path)
        if image.folder not in self._trees:
            self._trees.append(image.folder)
        numbers = (self._trees.index(image.folder), *(() if image.size is None else (image.offset, image.size)))
        name = path.relative_to(self._root) if path.is_relative_to(self._root) else path
        return os.fsencode(f"{' '.join(map(str, numbers))}/{name}")

    def _read(self, written: bytes) -> FileSlice:
        numbers, _, name = os.fsdecode(written).partition("/")
        tree, *place = map(int, numbers.split())
        offset, size = place or (0, None)
        path = str(self._root / name)
        return FileSlice(path, offset, size, folder=self._trees[tree], follow_links=self._follow_links)


def _address(item: Img2datasetCandidate) -> str | None:
    try:
        return address_of(item.read_metadata())
    except BadSample:
        return None


def _hash(address: str) -> int:
    digest = hashlib.blake2b(address.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
