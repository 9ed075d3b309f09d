"""A box of an image as an image of its own, cut out by the worker that writes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from eve_ds.data.errors import BadSample
from eve_ds.data.formats.captioned import Box
from eve_ds.data.image_check import encode_new
from eve_ds.data.image_file import open_image, to_rgb
from eve_ds.data.importers.candidate import FileSlice


@dataclass(frozen=True)
class Region:
    """A box of an image file.

    Attributes:
        image: the file.
        box: the box, in pixels of the upright image; parts outside the image are cut off.
    """

    image: FileSlice
    box: Box

    def read(self) -> bytes:
        """Encode the box as JPEG, or a very long one as PNG.

        Raises:
            BadSample: the file or the image cannot be used, the box is empty, or nothing of it lies in the image.
        """
        image = _decoded(self.image)
        if self.box.width <= 0 or self.box.height <= 0:
            raise BadSample("empty box")
        left, top = max(math.floor(self.box.x), 0), max(math.floor(self.box.y), 0)
        right = min(math.ceil(self.box.x + self.box.width), image.width)
        bottom = min(math.ceil(self.box.y + self.box.height), image.height)
        if right <= left or bottom <= top:
            raise BadSample("box outside the image")
        return encode_new(image.crop((left, top, right, bottom)))[0]


@lru_cache(maxsize=1)  # the boxes of an image follow one another
def _decoded(image: FileSlice) -> Image.Image:
    return to_rgb(open_image(image.read()))
