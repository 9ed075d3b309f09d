"""Options that determine the written shards."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from eve_ds.data.image_check import JPEG_QUALITY
from eve_ds.data.writing.excluded_ids import read_ids

EARLIER_QUALITY = 95
"""Quality of the JPEG files of versions without :attr:`WriterOptions.quality`."""


@dataclass(frozen=True)
class WriterOptions:
    """Options that determine the shards, in addition to the source."""

    samples_per_shard: int = 1000
    """Captions of one shard, skipped ones included; an image with several captions is never split."""
    max_size: int | None = None
    """Limit of an image's shorter side, in pixels; larger images are shrunk and stored as JPEG. None keeps the original
    bytes."""
    limit: int | None = None
    """Number of candidates to use from the start of the source; None: all."""
    exclude_ids: tuple[str, ...] = ()
    """Paths of files with one image per line, by its id or another of its names; these images are skipped."""
    unescape_html: bool = False
    """Replace HTML entities of captions by their characters."""
    quality: int = JPEG_QUALITY
    """Quality of the JPEG files of shrunk images, 1 to 100."""

    def describe(self) -> dict[str, Any]:
        """Return the options for JSON, with a digest of the excluded IDs because their files may change.

        `unescape_html` is left out where it is not set, and `quality` where it has no effect or is that of earlier
        versions, so that folders of versions without them stay complete.
        """
        listed = sorted(read_ids(self.exclude_ids).lines)
        digest = hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()
        described = asdict(self) | {"exclude_ids": digest if self.exclude_ids else None}
        left_out = {"unescape_html"} if not self.unescape_html else set()
        left_out |= {"quality"} if self.max_size is None or self.quality == EARLIER_QUALITY else set()
        return {name: value for name, value in described.items() if name not in left_out}
