"""Lists of addresses and captions with a folder that img2dataset filled from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from eve_ds.data.errors import SourceError
from eve_ds.data.formats.address_lists import ADDRESSED, AddressList
from eve_ds.data.formats.captioned import ImageCaptions
from eve_ds.data.formats.tables import NO_CAPTION, Columns
from eve_ds.data.importers.annotated_images import counted, fits_memory, sha256_of
from eve_ds.data.importers.candidate import Candidate, Skip, existing_file
from eve_ds.data.importers.downloads import Downloads
from eve_ds.data.importers.grouping import group_adjacent, group_all
from eve_ds.printable import excerpt

NOT_DOWNLOADED = "image not downloaded"


class Addresses:
    """Captions of lists, with the images that are in the folder; the address is the image id.

    Args:
        files: lists of SBU, CC3M, CC12M, LAION, DataComp, or of that form.
        images: output of img2dataset, as tars or files.
        columns: names of the columns, or keys, of addresses and captions.
        follow_links: whether links of single files may lead out of the folder.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        images: str | Path,
        columns: Columns = ADDRESSED,
        follow_links: bool = False,
    ) -> None:
        """Check the lists and find the images; raises :class:`SourceError`."""
        paths = [existing_file(path, "list of addresses") for path in files]
        self._lists = [AddressList(path, columns) for path in paths]
        self._groups_all = fits_memory(paths)
        self._images = Downloads(images, follow_links)
        numbers = [found.num_rows for found in self._lists]
        self.total: int | None = None if None in numbers else sum(number or 0 for number in numbers)
        self.description: dict[str, Any] = {
            "format": "urls",
            "lists": [{"path": str(path), "sha256": sha256_of(path)} for path in paths],
            "images": self._images.description,
            "columns": [columns.image, columns.caption],
            **columns.where.description(),
        }
        columns.where.require_values(chain.from_iterable(found.cells() for found in self._lists), paths[0])
        self._require_some_image(paths[0], images)

    def __iter__(self) -> Iterator[Candidate | Skip]:
        """Addresses in the order of the lists."""
        group = group_all if self._groups_all else group_adjacent
        return map(self._candidate, group(self._records()))

    def _require_some_image(self, path: Path, images: str | Path) -> None:
        """Raise :class:`SourceError` where no address has an image, with the first problem of the list itself."""
        unused: dict[str, str] = {}
        for record in self._records():
            if isinstance(record, ImageCaptions):
                return
            unused.setdefault(record.reason, record.name)
        problem = next((reason for reason in unused if reason != NOT_DOWNLOADED), None)
        if NOT_DOWNLOADED not in unused and problem is not None:
            raise SourceError(f"{path} has no usable address: {problem} (as {excerpt(unused[problem])})")
        raise SourceError(
            f"{path}: none of its addresses is one of the {len(self._images):,} images of {images}: give the folder "
            "that img2dataset filled from this list"
        )

    def _records(self) -> Iterator[ImageCaptions | Skip]:
        """Records with captions and an image."""
        for record in counted(chain.from_iterable(self._lists)):
            if isinstance(record, Skip):
                yield record
            elif not record.captions:
                yield Skip(record.image, NO_CAPTION)
            elif record.image not in self._images:
                yield Skip(record.image, NOT_DOWNLOADED)
            else:
                yield record

    def _candidate(self, record: ImageCaptions | Skip) -> Candidate | Skip:
        if isinstance(record, Skip):
            return record
        image = self._images[record.image]
        return Candidate(record.image, image, record.captions, record.image, record.image)
