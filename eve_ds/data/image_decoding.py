"""Choice of the JPEG decoder and the resampler of a run, and decoding the cropped part of an image. Imports no torch.

simplejpeg (the extra `turbo`) decodes a JPEG in four fifths of Pillow's time. Both call libjpeg-turbo and return
equal pixels: measured with versions 2.1.5, 3.1.2 and 3.2.0, baseline and progressive, gray and with every subsampling,
at full, half and quarter size. Pillow decides about every file that simplejpeg refuses or warns of, so both decoders
leave out the same samples, for the same reasons.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from eve_ds.config import ConfigError
from eve_ds.data.image_file import to_rgb, undecoded_file
from eve_ds.distributed import rank_zero
from eve_ds.log import get_logger

Decoder = Literal["pillow", "simplejpeg"]
Resampler = Literal["pillow", "torch"]
Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""

DECODER, RESAMPLER = "data.image_decoder", "data.image_resampler"
"""Keys of a data position; earlier versions had neither and used Pillow for both."""
REDUCTIONS = (8, 4, 2)
"""Factors by which libjpeg can reduce an image while it decodes; it then leaves out high frequencies."""
MARGIN = 2
"""A reduced image is at least this many times as large as needed, so that the resampler's filter decides what stays."""

_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of frames that simplejpeg gets: baseline, sequential and progressive, with Huffman codes."""
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
"""Markers without content: TEM, RST0 to RST7, start of image."""


class Decoding(NamedTuple):
    """What makes pixels of an encoded image."""

    decoder: Decoder
    """Decoder of plain JPEG files; Pillow decodes all others."""
    resampler: Resampler = "torch"
    """`torch`: crop, then antialiased bicubic filter on bytes. `pillow`: the filter sees pixels around the crop, and
    JPEG files are reduced down to the size that is needed; for runs that began so."""

    def position(self) -> dict[str, str]:
        """Return the entries of a data position."""
        return {DECODER: self.decoder, RESAMPLER: self.resampler}


def choose_decoding(
    setting: Literal["auto", "pillow", "simplejpeg"] = "auto", positions: Sequence[Mapping[str, Any]] = ()
) -> Decoding:
    """Resolve `data.image_decoder` for a new run, or for one that continues at saved positions.

    A run keeps its resampler. With "auto" it also keeps its decoder where that can be imported, or goes on with Pillow
    and a warning; another decoder that is named replaces it with a warning.

    Raises:
        ConfigError: the decoder that `setting` names cannot be imported.
    """
    problem = simplejpeg_problem() if setting != "pillow" else None
    if setting == "simplejpeg" and problem is not None:
        raise ConfigError(
            f"data.image_decoder (simplejpeg) cannot be imported ({problem}): pip install 'eve_ds[turbo]', or set it "
            "to auto or pillow"
        )
    best: Decoder = "simplejpeg" if problem is None and setting != "pillow" else "pillow"
    if not positions:
        return Decoding(best)
    saved, resampler = positions[0].get(DECODER, "pillow"), positions[0].get(RESAMPLER, "pillow")
    decoder = best if setting != "auto" or saved == "simplejpeg" else "pillow"
    if decoder != saved:
        _warn_of_change(saved, decoder, problem)
    return Decoding(decoder, resampler)


def _warn_of_change(saved: str, decoder: str, problem: str | None) -> None:
    """Log another decoder than the saved one: once for all ranks, or on each rank whose pixels change."""
    equal = features.check_feature("libjpeg_turbo")
    if equal and not rank_zero():
        return
    pixels = "equal pixels, as both use libjpeg-turbo"
    if not equal:
        pixels = "slightly different pixels, as this Pillow uses another library than libjpeg-turbo"
    reason = "data.image_decoder asks for it" if problem is None else f"simplejpeg cannot be imported: {problem}"
    get_logger().warning("%s decoded the images of this run, %s goes on (%s), with %s", saved, decoder, reason, pixels)


def simplejpeg_problem() -> str | None:
    """Return why simplejpeg cannot be imported; None if it can."""
    try:
        importlib.import_module("simplejpeg")
    except Exception as error:  # a package built for another NumPy raises ValueError
        return str(error)
    return None


def decode_part(image: Image.Image, box: Box, size: int, decoder: Decoder) -> NDArray[np.uint8]:
    """Decode the part of an image inside `box`, to (height, width, 3) uint8 RGB.

    A JPEG whose part is at least 2 * MARGIN times `size` high and wide is decoded at 1/2, 1/4 or 1/8 of its size, and
    the box is rounded to pixels of the reduced image. This saves a third of the time of large photographs, or more with
    Pillow, and changes the resampled image by a mean of .1 to .7 of 255.

    Args:
        image: opened by :func:`eve_ds.data.image_file.open_image`.
        box: part to decode, within the image.
        size: height and width to which the caller will resample the part.
        decoder: decoder of plain JPEG files.

    Raises:
        BadSample: truncated image, unreadable image, unusable pixel values.
    """
    scale = _reduction(image, box, size)
    pixels = _decode_plain(image, scale) if decoder == "simplejpeg" else None
    if pixels is not None:
        left, top, right, bottom = _reduced(box, scale)
        return pixels[top:bottom, left:right]
    if scale > 1 and image.draft("RGB", (image.width // scale, image.height // scale)) is not None:
        box = _reduced(box, scale)
    rgb = to_rgb(image)
    return np.array(rgb if box == (0, 0, *rgb.size) else rgb.crop(box))


def _reduction(image: Image.Image, box: Box, size: int) -> int:
    left, top, right, bottom = box
    enough = min(right - left, bottom - top) // (MARGIN * size)
    is_jpeg = undecoded_file(image) is not None and image.format in ("JPEG", "MPO")
    return next((scale for scale in REDUCTIONS if is_jpeg and scale <= enough), 1)


def _reduced(box: Box, scale: int) -> Box:
    left, top, right, bottom = ((edge + scale // 2) // scale for edge in box)
    return left, top, right, bottom


def _decode_plain(image: Image.Image, scale: int) -> NDArray[np.uint8] | None:
    """Decode an upright gray or RGB JPEG with simplejpeg at 1/`scale` of its size; None if Pillow must decide."""
    data = undecoded_file(image)
    if data is None or image.format != "JPEG" or image.mode not in ("L", "RGB") or _frame(data) not in _PLAIN_FRAMES:
        return None
    import simplejpeg

    height, width = -(-image.height // scale), -(-image.width // scale)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # also for every warning of libjpeg
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _frame(data: bytes) -> int | None:
    """Return the marker of a JPEG file's frame, the second byte of SOF0 to SOF15; None without one."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables of codes, reserved, conditioning
            return marker
        if marker == 0xFF:  # a byte of filling
            place += 1
        elif marker in _WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
