"""Open encoded images safely, and name the reason if one cannot be used. Imports no torch, which takes seconds."""

from __future__ import annotations

import io
import re

from PIL import Image

from eve_ds.data.errors import BadSample

READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows more, but some of those start other programs."""
MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image: the default of Pillow, a quarter of a gigabyte as RGB. Larger images are
refused before decoding."""

# Pillow reports zero-size images only as unidentified. PNG: IHDR chunk; JPEG: frame header, height before width.
_ZERO_SIZE = re.compile(
    rb"\x89PNG\r\n\x1a\n.{4}IHDR(\0{4}|.{4}\0{4})|\xff\xd8.*?\xff[\xc0-\xc2]..[\x08\x0c](\0\0|..\0\0)", re.DOTALL
)


def open_image(data: bytes) -> Image.Image:
    """Read the header of an encoded image of one of READ_FORMATS without decoding pixels.

    Raises:
        BadSample: zero-size image, decompression bomb, truncated image, unreadable image.
    """
    if not data:
        raise BadSample("zero-size image", "no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    except Exception as error:  # decoders raise a dozen exception types on damaged bytes
        if _ZERO_SIZE.match(data):
            raise BadSample("zero-size image", "its header gives a width or height of 0") from None
        raise undecodable(error) from None
    width, height = image.size
    if not width * height:
        raise BadSample("zero-size image", f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSample("decompression bomb", f"{width} x {height} pixels")
    return image


def undecodable(error: Exception) -> BadSample:
    """Turn the error of a decoder into one with a reason of :func:`open_image`."""
    if isinstance(error, Image.DecompressionBombError):
        return BadSample("decompression bomb", str(error))
    return BadSample("truncated image" if "truncated" in str(error).lower() else "unreadable image", str(error))
