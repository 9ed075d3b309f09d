"""Image processor of the transformers model, for encoded images, Pillow images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from eve_ds.data.image_file import open_image, upright
from eve_ds.data.transforms import normalize, resize

PixelSource = bytes | str | Path | Image.Image | NDArray[Any] | Tensor
"""Encoded image, path of its file, opened Pillow image, or array of pixels; see :func:`as_pillow`."""
CHANNELS = (1, 3, 4)
"""Numbers of channels of an array: gray, RGB, or RGB and opacity."""
TRANSFORM = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": Image.Resampling.BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_center_crop": False,
    "do_pad": False,
    "crop_size": None,
    "pad_size": None,
}
"""Settings of image processors of transformers -> the only value that describes the transform of training."""


class EveImageProcessor(BaseImageProcessor):
    """Image processor with exactly the evaluation transform of :mod:`eve_ds.data.transforms`.

    Args:
        image_size: height and width of the result, in pixels.
        kwargs: further arguments of the base class. Settings of the transform must describe that of training, which
            the weights need.

    Raises:
        ValueError: a setting asks for another transform.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012, declared like this by transformers

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        fixed = {**TRANSFORM, "size": {"height": image_size, "width": image_size}}
        for name, value in kwargs.items():
            if value is not None and name in fixed and value != fixed[name]:
                more = "; image_size sets the size" if name == "size" else ""
                raise ValueError(f"{name} ({value}) must be {fixed[name]}, as in training: leave it out{more}")
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(
        self, images: PixelSource | Sequence[PixelSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Convert one image or several to `pixel_values` (B, 3, image_size, image_size) float32 in -1..1.

        `images` is one image, a sequence of images, or an array or tensor of four dimensions.

        Raises:
            ValueError: no image, an array that :func:`as_pillow` refuses, or an image that cannot be decoded.
        """
        pixels = [self._resize(as_pillow(image)) for image in _single_images(images)]
        if not pixels:
            raise ValueError("images is empty: pass at least one image")
        return BatchFeature({"pixel_values": normalize(pixels)}, tensor_type=return_tensors)

    def _resize(self, image: Image.Image) -> NDArray[np.uint8]:
        return resize(image, (0, 0, *image.size), self.image_size)


def _single_images(images: Any) -> list[Any]:
    """List the images of a sequence, also of a nested one, or of an array with four dimensions."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    if isinstance(images, list | tuple):
        return [single for image in images for single in _single_images(image)]
    return [images]


def as_pillow(image: PixelSource) -> Image.Image:
    """Open one image with Pillow, upright.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, as integers in 0..255 or as floats in
    0..1.

    Raises:
        ValueError: an array of another shape or range, another type of image, or an image that cannot be decoded.
        OSError: the file cannot be read.
    """
    if isinstance(image, str | Path):
        return open_image(Path(image).read_bytes())
    if isinstance(image, bytes):
        return open_image(image)
    if isinstance(image, Tensor):
        known = image.float() if image.dtype == torch.bfloat16 else image  # which NumPy has not
        return Image.fromarray(_as_bytes(_channels_last(known.detach().cpu().numpy(), prefers_first=True)))
    if isinstance(image, np.ndarray):
        return Image.fromarray(_as_bytes(_channels_last(image, prefers_first=False)))
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"an image of type {type(image).__name__} cannot be read: pass a Pillow image, an array, a tensor, or a "
            "file as bytes or by its path"
        )
    if isinstance(image, JpegImageFile) and image.tile and image.fp:
        # Not decoded yet. `resize` decodes it at a smaller size, as in training, which would change the caller's image.
        image.fp.seek(0)
        return open_image(image.fp.read())
    return upright(image)


def _channels_last(array: NDArray[Any], prefers_first: bool) -> NDArray[Any]:
    """Return (H, W) or (H, W, C); where both ends could be channels, `prefers_first` decides."""
    if array.ndim == 2:
        return array
    if array.ndim == 3 and (array.shape[0] in CHANNELS or array.shape[2] in CHANNELS):
        is_first = array.shape[0] in CHANNELS and (prefers_first or array.shape[2] not in CHANNELS)
        array = array.transpose(1, 2, 0) if is_first else array
        return array[..., 0] if array.shape[2] == 1 else array
    raise ValueError(f"an image of shape {array.shape} must be (H, W), (H, W, C) or (C, H, W) with C one of {CHANNELS}")


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the pixels as uint8; floats in 0..1 are those of `torchvision.transforms.ToTensor`."""
    is_float = np.issubdtype(array.dtype, np.floating)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    highest = 1 if is_float else 255
    if not (is_float or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"an image of dtype {array.dtype} must hold integers in 0..255 or floats in 0..1")
    if array.size and not (array.min() >= 0 and array.max() <= highest):
        raise ValueError(
            f"an image of dtype {array.dtype} has values from {array.min():g} to {array.max():g}, which must be within "
            f"0..{highest}: pass pixels that are not normalized yet"
        )
    return np.round(array * 255).astype(np.uint8) if is_float else array.astype(np.uint8)
