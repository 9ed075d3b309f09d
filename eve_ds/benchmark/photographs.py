"""Photographs for benchmarks: parts of the pictures that scikit-image ships, as JPEG files of two usual sizes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from eve_ds.data.importers import Candidate, InlineBytes

SIZES = ((500, 375), (640, 480))
"""Width and height, in turn."""
PICTURES = ("astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry")
"""Functions of `skimage.data` whose pictures are in its wheel and are large enough."""
QUALITY = 90
SMALLEST_PART = 0.6
"""Smallest side of a part, relative to the largest part of its shape that fits into the picture."""


class Photographs:
    """Source of shards, and the files in it: drawn parts of pictures, resized; the same in every call.

    Args:
        pictures: the module `skimage.data`.
        count: number of photographs.
    """

    def __init__(self, pictures: ModuleType, count: int) -> None:
        whole = [Image.fromarray(getattr(pictures, name)()).convert("RGB") for name in PICTURES]
        rng = np.random.default_rng(0)
        self.files = [_photograph(whole[i % len(whole)], SIZES[i % len(SIZES)], rng) for i in range(count)]
        self.total: int | None = count
        self.description: dict[str, Any] = {"format": "photographs", "count": count}

    def __iter__(self) -> Iterator[Candidate]:
        """Yield the photographs as samples."""
        for number, data in enumerate(self.files):
            yield Candidate(str(number), InlineBytes(data), (f"a small red circle {number}",), str(number))


def _photograph(picture: Image.Image, size: Sequence[int], rng: np.random.Generator) -> bytes:
    width, height = size
    zoom = rng.uniform(SMALLEST_PART, 1) * min(picture.width / width, picture.height / height)
    part_width, part_height = int(width * zoom), int(height * zoom)
    left = int(rng.integers(picture.width - part_width + 1))
    top = int(rng.integers(picture.height - part_height + 1))
    part = picture.crop((left, top, left + part_width, top + part_height))
    file = io.BytesIO()
    part.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
