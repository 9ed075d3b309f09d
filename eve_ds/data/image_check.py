"""Decode an image once before it is written to a shard, so that training meets no unreadable image."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from eve_ds.data.image_file import decode, read_header, to_rgb, undecodable, upright

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are stored unchanged -> suffix in the shard. Other formats are converted to PNG."""
JPEG_QUALITY = 90
"""Default quality of the JPEG files that shrinking writes."""

JPEG_SIDE = 65_500
"""Longest side of an image that libjpeg writes, in pixels (JPEG_MAX_DIMENSION of jmorecfg.h)."""


def encode_for_shard(data: bytes, max_size: int | None = None, quality: int = JPEG_QUALITY) -> tuple[bytes, str]:
    """Decode an image completely and return the bytes to store with their suffix (`jpg`, `png` or `webp`).

    JPEG, PNG and WebP keep their bytes in any color mode and orientation; other formats are stored as upright RGB PNG.

    Args:
        data: an encoded image.
        max_size: limit of the shorter side, in pixels; a larger image is shrunk to it and stored as RGB JPEG (PNG where
            its longer side exceeds JPEG_SIDE). None: no limit.
        quality: quality of that JPEG, 1 to 100.

    Raises:
        BadSample: the image cannot be used; the reasons are those of :func:`eve_ds.data.image_file.open_image`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF and the like; they would flood the terminal
        with read_header(data) as image:
            try:
                return _store(image, data, max_size, quality)
            except MemoryError:
                raise
            except Exception as error:  # decoders of damaged data raise nearly anything: OSError, struct.error, ...
                raise undecodable(error) from None


def _store(image: Image.Image, data: bytes, max_size: int | None, quality: int) -> tuple[bytes, str]:
    suffix = KEPT_FORMATS.get(image.format or "")
    shrink = max_size is not None and min(image.size) > max_size
    if shrink and max_size is not None:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the target size keeps enough detail for the filter.
        scale = 2 * max_size / min(image.size)
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
    decode(image)
    if shrink and max_size is not None:
        return encode_new(_shrink(to_rgb(upright(image)), max_size), quality)
    if suffix is None:
        return _encode(to_rgb(upright(image)), "PNG"), "png"
    return data, suffix


def _shrink(image: Image.Image, max_size: int) -> Image.Image:
    scale = max_size / min(image.size)
    size = (max(max_size, round(image.width * scale)), max(max_size, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode_new(image: Image.Image, quality: int = JPEG_QUALITY) -> tuple[bytes, str]:
    """An RGB image as JPEG, or as PNG where a side is longer than JPEG files of libjpeg may be; with its suffix."""
    if max(image.size) > JPEG_SIDE:
        return _encode(image, "PNG"), "png"
    return _encode(image, "JPEG", quality=quality), "jpg"


def _encode(image: Image.Image, image_format: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()
