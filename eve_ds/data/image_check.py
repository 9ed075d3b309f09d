"""Decode an image once before it is written to a shard, so that training meets no unreadable image."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from eve_ds.data.errors import BadSample

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are stored unchanged -> suffix in the shard. Other formats are converted to PNG."""
READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows more, but some of those start other programs."""
JPEG_QUALITY = 95
"""Quality of the JPEG files that shrinking writes."""
PNG_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def check_image(data: bytes, max_size: int | None = None) -> tuple[bytes, str]:
    """Decode an image completely and return the bytes to store with their suffix (`jpg`, `png` or `webp`).

    JPEG, PNG and WebP keep their bytes in any color mode; other formats are stored as RGB PNG.

    Args:
        data: an encoded image.
        max_size: limit of the shorter side, in pixels; a larger image is shrunk to it and stored as RGB JPEG. None: no
            limit.

    Raises:
        BadSample: an empty file, an unknown format, zero width or height, truncated or damaged content, or more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    if not data:
        raise BadSample("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF and the like; they would flood the terminal
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
                return _store(image, data, max_size)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample("decompression bomb") from None
        except UnidentifiedImageError:
            raise BadSample("zero-size image" if _zero_size_png(data) else "not an image") from None
        except (BadSample, MemoryError):
            raise
        except Exception:  # decoders of damaged data raise nearly anything: OSError, SyntaxError, struct.error, ...
            raise BadSample("truncated or damaged image") from None


def _store(image: Image.Image, data: bytes, max_size: int | None) -> tuple[bytes, str]:
    if 0 in image.size:
        raise BadSample("zero-size image")
    suffix = KEPT_FORMATS.get(image.format or "")
    shrink = max_size is not None and min(image.size) > max_size
    if shrink and max_size is not None:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the target size keeps enough detail for the filter.
        scale = 2 * max_size / min(image.size)
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
    image.load()
    if shrink and max_size is not None:
        return _encode(_shrink(ImageOps.exif_transpose(image).convert("RGB"), max_size), "JPEG"), "jpg"
    if suffix is None:
        return _encode(image.convert("RGB"), "PNG"), "png"
    return data, suffix


def _shrink(image: Image.Image, max_size: int) -> Image.Image:
    scale = max_size / min(image.size)
    size = (max(max_size, round(image.width * scale)), max(max_size, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **({"quality": JPEG_QUALITY} if image_format == "JPEG" else {}))
    return file.getvalue()


def _zero_size_png(data: bytes) -> bool:
    return data.startswith(PNG_HEADER) and b"\0\0\0\0" in (data[16:20], data[20:24])
