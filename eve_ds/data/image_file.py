"""What an encoded image becomes: an upright 8-bit RGB image. Imports no torch, which takes seconds.

Training, `prepare`, downstream tasks and evaluation open images here only, so that they see the same pixels:

- Orientation: the one of EXIF or XMP is applied.
- Several frames or pages: the first one.
- Transparency, of any mode: on white.
- Gray of 16 bits (modes I;16, I;16B, I;16L; I of PNG and PPM): v * 255 / 65535, rounded. A TIFF of fewer bits, such as
  12, has another largest value.
- Gray of 32 bits, whole (I) or floating-point (F): v * 255 / m, rounded, where m is the smallest of 1 (F only), 255 and
  65535 that is no smaller than any value. An image with other values is unusable.
- TIFF whose 0 is white (PhotometricInterpretation 0): inverted, whatever the number of bits.
- Every other mode (1, L, P, CMYK, YCbCr, LAB, HSV): as Pillow converts it. It inverts the CMYK of Adobe's JPEG files.
"""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from eve_ds import limits
from eve_ds.data.errors import BadSample
from eve_ds.data.failed_download import failed_download

_HAS_AVIF = "avif" in features.modules and features.check_module("avif")  # Pillow 11.3, where libavif was there
READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if _HAS_AVIF else []))
"""Formats that are read. Pillow knows more, but some of those start other programs, as EPS starts Ghostscript."""
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pnm", "jfif")
"""Extensions of image files, without the dot; where a sample has several images, the first one in this order counts."""

_ORIENTATION = 0x0112
"""EXIF tag; 1: upright."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of TIFF; a photometric interpretation of 0 means that 0 is white."""
_SIXTEEN_BITS = 65535
# Pillow reports zero-size images only as unidentified. PNG: IHDR chunk; JPEG: frame header, height before width.
_ZERO_SIZE = re.compile(
    rb"\x89PNG\r\n\x1a\n.{4}IHDR(\0{4}|.{4}\0{4})|\xff\xd8.*?\xff[\xc0-\xc2]..[\x08\x0c](\0\0|..\0\0)", re.DOTALL
)
_OTHER_FORMATS = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
    "PSD": rb"8BPS",
    "ICO": rb"\0\0\x01\0",
}
"""Formats that users have and that are not read -> first bytes."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image of one of READ_FORMATS, upright; an upright JPEG is not decoded yet.

    Raises:
        BadSample: zero-size image, decompression bomb, too large a file, truncated image, unreadable image.
    """
    return upright(read_header(data))


def read_header(data: bytes) -> Image.Image:
    """Read the header of an encoded image of one of READ_FORMATS without decoding pixels; it may not be upright.

    Raises:
        BadSample: as :func:`open_image`.
    """
    if not data:
        raise BadSample("zero-size image", "no bytes")
    if len(data) > limits.IMAGE_BYTES:
        raise BadSample("too large an image file", f"{len(data):,} bytes, more than {limits.IMAGE_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    except Exception as error:  # decoders raise a dozen exception types on damaged bytes
        raise _unopened(data, error) from None
    width, height = image.size
    if not width * height:
        raise BadSample("zero-size image", f"{width} x {height} pixels")
    if width * height > limits.IMAGE_PIXELS:
        raise BadSample("decompression bomb", f"{width} x {height} pixels")
    _scale_transparent_level(image)
    return image


def undecoded_file(image: Image.Image) -> bytes | None:
    """Return the file of an image that :func:`open_image` has not decoded; None for every other image."""
    file = getattr(image, "fp", None)
    return file.getvalue() if isinstance(file, io.BytesIO) and getattr(image, "tile", None) else None


def _scale_transparent_level(image: Image.Image) -> None:
    """Scale the transparent level of a gray PNG of 2 or 4 bits to 8 bits, as Pillow scales the pixels but not it."""
    level = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # how the pixels are stored, until they are decoded
    depth = {"L;2": 2, "L;4": 4}.get(str(tiles[0].args)) if tiles else None
    if image.format == "PNG" and depth is not None and isinstance(level, int):
        image.info["transparency"] = level * 255 // (2**depth - 1)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image by its orientation; an upright one is returned itself, and not decoded if it is a JPEG.

    Raises:
        BadSample: truncated image, unreadable image.
    """
    if image.format not in ("JPEG", "MPO"):
        decode(image)  # the orientation of a PNG may stand behind its pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF, in which Pillow meets nearly any exception
        return image
    if orientation not in range(2, 9):
        return image
    decode(image)
    return ImageOps.exif_transpose(image)


def decode(image: Image.Image) -> None:
    """Decode the pixels; raises :class:`BadSample` for a truncated or unreadable image."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise undecodable(error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB by the rules of this module; an opaque RGB image is returned itself.

    Raises:
        BadSample: truncated image, unreadable image, unusable pixel values.
    """
    decode(image)
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _eight_bits(image).convert("RGB")
        if image.has_transparency_data:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # such as a palette of the wrong length
        raise undecodable(error) from None


def undecodable(error: Exception) -> BadSample:
    """Turn the error of a decoder into one with a reason of :func:`open_image`."""
    if isinstance(error, BadSample):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return BadSample("decompression bomb", str(error))
    return BadSample("truncated image" if "truncated" in str(error).lower() else "unreadable image", str(error))


def _unopened(data: bytes, error: Exception) -> BadSample:
    if _ZERO_SIZE.match(data):
        return BadSample("zero-size image", "its header gives a width or height of 0")
    failed = failed_download(data[:1024])
    if failed is not None:
        return BadSample(f"no image but {failed}", "get the file again")
    for name, start in _OTHER_FORMATS.items():
        if re.match(start, data[:1024], re.DOTALL):
            return BadSample(f"unreadable image ({name})", f"not one of {', '.join(READ_FORMATS)}: convert it to PNG")
    if isinstance(error, Image.UnidentifiedImageError):
        return BadSample("unreadable image", f"not one of {', '.join(READ_FORMATS)}")
    return undecodable(error)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray of 12 to 32 bits to mode L; a transparent level becomes white."""
    values = np.asarray(image)
    scale = np.float32(255 / _full_scale(image, values))
    pixels = np.rint(values.astype(np.float32) * scale).astype(np.uint8)
    if _tiff_tag(image, _PHOTOMETRIC) == 0:  # Pillow inverts images of up to 8 bits only
        pixels = 255 - pixels
    transparent = image.info.get("transparency")
    return Image.fromarray(pixels if transparent is None else np.where(values == transparent, np.uint8(255), pixels))


def _full_scale(image: Image.Image, values: NDArray[np.generic]) -> int:
    """Largest value of the image's type."""
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return int(2 ** (_tiff_tag(image, _BITS_PER_SAMPLE) or 16) - 1)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _SIXTEEN_BITS
    least, most = values.min(), values.max()
    scales = (1, 255, _SIXTEEN_BITS) if image.mode == "F" else (255, _SIXTEEN_BITS)
    scale = next((scale for scale in scales if least >= 0 and most <= scale), None)  # NaN fits none
    if scale is None:
        raise BadSample("unusable pixel values", f"from {least} to {most}; expected 0 to 1, 255 or {_SIXTEEN_BITS}")
    return scale


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    """First value of a tag; None for an image that has no such tag, or is no TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # A PNG of 16 bits: Pillow keeps the high bytes of its pixels, and this color as it was.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    color = image.convert("LA") if image.mode == "La" else image
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, color.convert("RGBA")).convert("RGB")
