"""Image transforms from encoded bytes to model pixels: decode, random resized crop, flip, normalize."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eve_ds.data.image_decoding import Box, Decoding, choose_decoding, decode_part
from eve_ds.data.image_file import open_image, to_rgb, undecodable
from eve_ds.data.masking import sample_rng
from eve_ds.data.pixels import normalized

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Range of the aspect ratio (width / height) of a random crop."""
CROP_ATTEMPTS = 10
"""Random crops to try before a central crop."""

_DIRECTION = re.compile(r"\b(left|right)", re.IGNORECASE)


def names_direction(caption: str) -> bool:
    """Whether a caption has a left/right word (`left`, `Right-hand`, `leftmost`), which a flip would make false."""
    return _DIRECTION.search(caption) is not None


def crop_box(width: int, height: int, scale: tuple[float, float], rng: Generator) -> Box:
    """Draw the box of RandomResizedCrop (Szegedy et al. 2015, as in torchvision): an area, then an aspect ratio.

    If ten draws do not fit into the image, the box is the central crop with the nearest allowed aspect ratio.

    Args:
        width: width of the image, in pixels.
        height: height of the image, in pixels.
        scale: range of the area, as fractions of the image; (1, 1) gives the whole image.
        rng: source of randomness.
    """
    if scale == (1.0, 1.0):
        return 0, 0, width, height
    low, high = ASPECT_RATIOS
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * high)))
    box_height = min(height, max(1, round(width / low)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def resize(image: Image.Image, box: Box, size: int, decoding: Decoding | None = None) -> NDArray[np.uint8]:
    """Decode the part of an image inside `box` and resample it (bicubic, antialiased) to (size, size, 3) uint8 RGB.

    Args:
        image: opened by :func:`eve_ds.data.image_file.open_image`, or any other Pillow image.
        box: part of the image.
        size: height and width of the result, in pixels.
        decoding: decoder and resampler; None: the fastest that are installed.

    Raises:
        BadSample: truncated image, unreadable image, unusable pixel values.
    """
    decoding = decoding or choose_decoding()
    try:
        if decoding.resampler == "pillow":
            return _resize_by_pillow(image, box, size)
        return _resample(decode_part(image, box, size, decoding.decoder), size)
    except Exception as error:  # the decoder runs here, see open_image
        raise undecodable(error) from None


def _resample(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 to (size, size, 3) uint8; torch's filter on bytes is twice as fast as Pillow's."""
    if pixels.shape == (size, size, 3):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # stays channels last, which torch's filter on bytes wants
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _resize_by_pillow(image: Image.Image, box: Box, size: int) -> NDArray[np.uint8]:
    """Resample as earlier versions did, for the runs that they began."""
    part = _decode_smaller(image, box, size)
    rgb = to_rgb(image)
    if rgb.size != (size, size) or part != (0, 0, size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=part)
    return np.asarray(rgb)


def _decode_smaller(image: Image.Image, box: Box, size: int) -> tuple[float, float, float, float]:
    width, height = image.size
    left, top, right, bottom = box
    enough = (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top)))
    drafted = image.draft("RGB", enough)  # None for other formats than JPEG
    if drafted is None:
        return box
    x, y = drafted[1][2] / width, drafted[1][3] / height
    return left * x, top * y, right * x, bottom * y


class TrainTransform:
    """Random resized crop and flip of one sample, as functions of (seed, epoch, key).

    Args:
        size: height and width of the result, in pixels.
        crop_scale: range of the area of the crop; see :func:`crop_box`.
        flip: probability of a horizontal flip if the caption contains no left/right word.
        seed: seed of the run.
        decoding: decoder and resampler; None: the fastest that are installed.
    """

    def __init__(
        self, size: int, crop_scale: tuple[float, float], flip: float, seed: int, decoding: Decoding | None = None
    ) -> None:
        self._size, self._crop_scale, self._flip, self._seed = size, crop_scale, flip, seed
        self._decoding = decoding or choose_decoding()
        self._random = crop_scale != (1.0, 1.0) or flip > 0

    def __call__(
        self, image: bytes | NDArray[np.uint8], caption: str | None, epoch: int, key: str
    ) -> NDArray[np.uint8]:
        """Transform encoded bytes or an (H, W, 3) uint8 array into (size, size, 3) uint8.

        An array of this size is returned unchanged if neither crop nor flip is random.

        Raises:
            BadSample: the image cannot be decoded.
        """
        is_ready = isinstance(image, np.ndarray) and image.shape == (self._size, self._size, 3)
        if is_ready and not self._random:
            return image  # type: ignore[return-value]
        # Not the generator of the masks, which must not depend on the crop.
        rng = sample_rng(self._seed, epoch, f"{key}/crop")
        picture = open_image(image) if isinstance(image, bytes) else Image.fromarray(image)
        pixels = resize(picture, crop_box(*picture.size, self._crop_scale, rng), self._size, self._decoding)
        flips = rng.random() < self._flip and not (caption and names_direction(caption))
        return pixels[:, ::-1] if flips else pixels


def channels_first(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Tensor:
    """Stack (H, W, 3) uint8 images, flipped ones too, to (B, 3, H, W) uint8.

    NumPy turns one image at a time in less time than it takes to stack them, above all flipped ones.
    """
    height, width, channels = images[0].shape
    stacked = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for image, place in zip(images, stacked, strict=True):
        place[...] = image.transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def normalize(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Tensor:
    """Convert B images, (H, W, 3) uint8, to (B, 3, H, W) float32 with mean = std = 0.5, from 0..255 to -1..1."""
    return normalized(channels_first(images))
