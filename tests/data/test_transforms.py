"""Decoding, cropping, flipping, normalizing; and reasons for unusable images."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import Decoding
from eve_ds.data.image_file import open_image
from eve_ds.data.masking import sample_rng
from eve_ds.data.transforms import (
    ASPECT_RATIOS,
    TrainTransform,
    channels_first,
    crop_box,
    names_direction,
    normalize,
    resize,
)


def photo(width=200, height=150, seed=0):
    """Return a smooth image, like a photograph: a small random image, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width, height):
    """Return a PNG with a given size in its header and only the first 100 bytes of its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def whole(data, size=32):
    image = open_image(data)
    return resize(image, (0, 0, *image.size), size)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = whole(encode(photo().convert("I").convert(mode) if mode == "I;16" else photo().convert(mode), kind))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


def test_resizing_equals_pillow_up_to_rounding():
    """Both filter rows and columns one after the other with weights of whole numbers, and round to bytes between."""
    for size in (32, 160, 400):
        expected = np.asarray(photo().resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(whole(encode(photo()), size) - expected).max() <= 1


def test_resizing_is_as_exact_as_pillow():
    """The reference is the same filter in double precision."""
    pixels = np.asarray(photo(197, 149))
    exact = F.interpolate(
        torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None], (64, 64), mode="bicubic", antialias=True
    )
    exact = exact[0].permute(1, 2, 0).clamp(0, 255).numpy()
    by_pillow = np.asarray(photo(197, 149).resize((64, 64), Image.Resampling.BICUBIC))
    error, of_pillow = (np.abs(found - exact).mean() for found in (whole(encode(photo(197, 149)), 64), by_pillow))
    assert error < 1.01 * of_pillow


def test_crop_is_cut_before_it_is_resized():
    box = (20, 10, 120, 90)
    expected = np.asarray(photo().crop(box).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(open_image(encode(photo())), box, 32) - expected).max() <= 1


OF_EARLIER_VERSIONS = Decoding("pillow", "pillow")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("box", [(20, 10, 120, 90), (0, 0, 200, 150)])
def test_runs_of_earlier_versions_keep_the_filter_of_pillow(box, kind):
    """It sees the pixels around the crop."""
    with Image.open(io.BytesIO(encode(photo(), kind))) as image:
        expected = np.asarray(image.resize((80, 80), Image.Resampling.BICUBIC, box=box))
    assert (resize(open_image(encode(photo(), kind)), box, 80, OF_EARLIER_VERSIONS) == expected).all()


@pytest.mark.parametrize("box", [(0, 0, 801, 603), (100, 50, 700, 600), (301, 203, 399, 299)])
def test_reduced_decoding_of_earlier_versions_is_accurate(box):
    """The mean error against full decoding is below 2 of 255, less than that of a JPEG of quality 75."""
    data = encode(photo(801, 603), "JPEG", quality=90)
    scaled = resize(open_image(data), box, 64, OF_EARLIER_VERSIONS).astype(int)
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC, box=box)
    assert np.abs(scaled - np.asarray(full).astype(int)).mean() < 2


def test_reduced_decoding_of_earlier_versions_goes_down_to_the_target_size():
    image = open_image(encode(photo(801, 603), "JPEG"))
    resize(image, (0, 0, 801, 603), 64, OF_EARLIER_VERSIONS)
    assert image.size == (101, 76)
    image = open_image(encode(photo(801, 603), "JPEG"))
    resize(image, (0, 0, 120, 120), 64, OF_EARLIER_VERSIONS)
    assert image.size == (801, 603)


BAD_IMAGES = {
    "empty": (b"", "zero-size image"),
    "no image": (b"<html>not found</html>", "no image but a web page"),
    "zero-width JPEG": (
        encode(Image.new("L", (0x0102, 0x0304)), "JPEG").replace(b"\x03\x04\x01\x02", b"\x03\x04\0\0"),
        "zero-size image",
    ),
    "zero-height PNG": (png_of_size(5, 0), "zero-size image"),
    "zero-width PNG": (png_of_size(0, 5), "zero-size image"),
    "bomb": (png_of_size(20_000, 5_000), "decompression bomb"),
    "large bomb": (png_of_size(60_000, 60_000), "decompression bomb"),
    "truncated JPEG": (encode(photo(), "JPEG")[:1500], "truncated image"),
    "truncated PNG": (encode(photo())[:5000], "truncated image"),
    "cut in the header": (encode(photo(), "JPEG")[:40], "truncated image"),
    "few pixels": (png_of_size(20, 20), "truncated image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_gives_its_reason(name):
    data, reason = BAD_IMAGES[name]
    with pytest.raises(BadSample) as caught:
        whole(data)
    assert caught.value.reason == reason
    assert len(str(caught.value)) > len(reason), "the message must contain details"


def test_formats_that_start_another_program_are_not_opened():
    with pytest.raises(BadSample, match="unreadable image"):
        open_image(encode(photo(), "EPS"))


@given(width=st.integers(1, 500), height=st.integers(1, 500), low=st.floats(0.01, 1.0), key=st.text(max_size=3))
def test_crop_lies_within_the_image(width, height, low, key):
    left, top, right, bottom = crop_box(width, height, (low, 1.0), sample_rng(0, 0, key))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_areas_and_ratios_of_crops_follow_the_configuration():
    boxes = [crop_box(400, 300, (0.2, 0.5), sample_rng(0, 0, str(number))) for number in range(2000)]
    widths, heights = (np.array([box[i + 2] - box[i] for box in boxes], dtype=float) for i in (0, 1))
    areas, ratios = widths * heights / 120_000, widths / heights
    assert areas.min() > 0.195
    assert areas.max() < 0.505
    assert areas.mean() == pytest.approx(0.35, abs=0.01)
    assert ratios.min() > ASPECT_RATIOS[0] * 0.98
    assert ratios.max() < ASPECT_RATIOS[1] * 1.02
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)
    lefts = np.array([box[0] for box in boxes]) / (400 - widths)
    assert lefts.mean() == pytest.approx(0.5, abs=0.03)


def test_very_wide_or_tall_images_are_cropped_in_the_center():
    """No crop of the required area has an allowed ratio, so the widest (tallest) allowed ratio is used."""
    assert crop_box(1000, 10, (0.5, 1.0), sample_rng(0, 0, "k")) == (493, 0, 506, 10)
    assert crop_box(10, 1000, (0.5, 1.0), sample_rng(0, 0, "k")) == (0, 493, 10, 506)


def test_scale_one_keeps_the_whole_image():
    assert crop_box(37, 91, (1.0, 1.0), sample_rng(0, 0, "k")) == (0, 0, 37, 91)


@pytest.mark.parametrize("caption", ["a dog on the left", "Right-hand side", "the leftmost box", "top RIGHT"])
def test_direction_words_are_detected(caption):
    assert names_direction(caption)


@pytest.mark.parametrize("caption", ["a bright light", "aleft", "above the box", ""])
def test_other_words_are_not_directions(caption):
    assert not names_direction(caption)


def flipped(transform, caption, key):
    pixels = transform(np.asarray(photo(32, 32)), caption, 0, key)
    if (pixels == np.asarray(photo(32, 32))).all():
        return False
    assert (pixels[:, ::-1] == np.asarray(photo(32, 32))).all()
    return True


def test_flips_have_the_configured_frequency_and_exclude_captions_with_directions():
    transform = TrainTransform(32, (1.0, 1.0), 0.3, seed=0)
    flips = [flipped(transform, "a dog", str(number)) for number in range(1000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.05)
    assert not any(flipped(transform, "a dog on the left", str(number)) for number in range(100))
    assert any(flipped(transform, None, str(number)) for number in range(100))


def test_augmentation_is_a_function_of_seed_epoch_and_key():
    def draw(seed, epoch, key):
        return TrainTransform(16, (0.2, 1.0), 0.5, seed)(encode(photo()), "a dog", epoch, key)

    assert (draw(0, 0, "a") == draw(0, 0, "a")).all()
    others = [draw(1, 0, "a"), draw(0, 1, "a"), draw(0, 0, "b")]
    assert all((draw(0, 0, "a") != other).any() for other in others)


def test_array_of_the_target_size_is_returned_unchanged(monkeypatch):
    monkeypatch.setattr(Image, "fromarray", None)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    assert TrainTransform(64, (1.0, 1.0), 0.0, seed=0)(image, "a", 0, "k") is image


def test_array_of_another_size_is_resized():
    pixels = TrainTransform(32, (1.0, 1.0), 0.0, seed=0)(np.asarray(photo()), "a", 0, "k")
    assert (pixels == whole(encode(photo()))).all()


def test_channels_first_stacks_images_of_any_memory_layout():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    turned = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    stacked = channels_first([images[0][:, ::-1], turned[1], images[2]])
    expected = torch.stack([torch.from_numpy(images[0]).flip(1), *torch.from_numpy(images[1:])]).permute(0, 3, 1, 2)
    assert stacked.is_contiguous()
    assert torch.equal(stacked, expected)
    assert torch.equal(channels_first(images), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_normalize_uses_mean_and_deviation_of_one_half():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    images[0, 0, 0] = [0, 255, 128]
    pixels = normalize(images)
    expected = (torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=2e-7)
    assert pixels[0, :2, 0, 0].tolist() == [-1.0, 1.0]
