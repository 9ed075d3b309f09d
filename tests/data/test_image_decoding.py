"""Decoders of JPEG files: equal pixels, equal reasons for damaged files, and the choice for new and resumed runs."""

import io
import logging
import sys

import numpy as np
import pytest
import simplejpeg
import skimage
from PIL import Image

from eve_ds.config import ConfigError
from eve_ds.data import image_decoding
from eve_ds.data.errors import BadSample
from eve_ds.data.image_decoding import Decoding, choose_decoding, decode_part
from eve_ds.data.image_file import open_image
from eve_ds.data.masking import sample_rng
from eve_ds.data.transforms import crop_box, resize

ORIENTATION = 0x0112


def photograph(width, height, left=0):
    """Part of a photograph that scikit-image ships."""
    whole = Image.fromarray(skimage.data.coffee())
    return whole.crop((left, 0, left + 400, 400 * height // width)).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_turbo(subsampling):
    """JPEG with a subsampling that Pillow does not write."""
    return simplejpeg.encode_jpeg(np.array(photograph(99, 67)), colorsubsampling=subsampling)


def exif(orientation):
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


PHOTO = photograph(99, 67)
PLAIN = {
    "4:4:4": encode(PHOTO, subsampling=0),
    "4:2:2": encode(PHOTO, subsampling=1),
    "4:2:0": encode(PHOTO, subsampling=2),
    "4:1:1": by_turbo("411"),
    "4:4:0": by_turbo("440"),
    "progressive": encode(PHOTO, progressive=True),
    "progressive gray": encode(PHOTO.convert("L"), progressive=True),
    "gray": encode(PHOTO.convert("L")),
    "RGB, not YCbCr": encode(PHOTO, keep_rgb=True),
    "restart markers": encode(PHOTO, restart_marker_blocks=3),
    "optimized, quality 20": encode(PHOTO, optimize=True, quality=20),
    "comment and profile": encode(PHOTO, comment=b"x" * 70, icc_profile=b"y" * 140_000),
    "upright by EXIF": encode(PHOTO, exif=exif(1)),
    "one pixel": encode(PHOTO.crop((0, 0, 1, 1))),
    "even sides": encode(photograph(96, 64)),
    "bytes of filling": encode(PHOTO).replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
}
OTHER = {
    "CMYK": encode(PHOTO.convert("CMYK")),
    "turned": encode(PHOTO, exif=exif(6)),
    "two pictures": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    "no JPEG": encode(PHOTO, "PNG"),
    "extraneous bytes": encode(PHOTO).replace(b"\xff\xda", b"\0\0\xff\xda", 1),
}


def decoded(data, decoder, reduction=1):
    image = open_image(data)
    shorter = min(image.size)
    return decode_part(image, (0, 0, *image.size), max(shorter // (2 * reduction), 1), decoder)


def refuse_pillow(image):
    raise AssertionError("Pillow decoded the image")


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", PLAIN)
def test_both_decoders_give_equal_pixels(kind, reduction, monkeypatch):
    expected = decoded(PLAIN[kind], "pillow", reduction)
    monkeypatch.setattr(image_decoding, "to_rgb", refuse_pillow)
    assert (decoded(PLAIN[kind], "simplejpeg", reduction) == expected).all()
    with Image.open(io.BytesIO(PLAIN[kind])) as image:
        if reduction == 1:
            assert (expected == np.asarray(image.convert("RGB"))).all()
        elif kind not in ("one pixel", "even sides"):
            assert expected.shape == (round(image.height / reduction), round(image.width / reduction), 3)


@pytest.mark.parametrize("kind", OTHER)
def test_pillow_decodes_all_other_images(kind, monkeypatch):
    pillow = decoded(OTHER[kind], "pillow")
    assert (decoded(OTHER[kind], "simplejpeg") == pillow).all()
    monkeypatch.setattr(image_decoding, "to_rgb", refuse_pillow)
    with pytest.raises(AssertionError, match="Pillow decoded"):
        decoded(OTHER[kind], "simplejpeg")


def damaged_files(data, seed):
    """Yield copies that are cut, have wrong bytes, or lack, repeat or gain some."""
    rng = np.random.default_rng(seed)
    for length in {*rng.integers(2, len(data), 25).tolist(), *range(len(data) - 6, len(data))}:
        yield data[:length]
        yield data[:length] + b"\xff\xd9"
    for _ in range(80):
        changed = bytearray(data)
        for place in rng.integers(2, len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        yield bytes(changed)
    for start, end in np.sort(rng.integers(2, len(data), (25, 2))).tolist():
        yield data[:start] + data[end:]
        yield data[:end] + data[start:]
        yield data[:start] + rng.bytes(5) + data[start:]


def outcome(data, decoder):
    """Pixels, or the reason for which the sample is left out."""
    try:
        image = open_image(data)
        return resize(image, (0, 0, *image.size), 16, Decoding(decoder)).tobytes()
    except BadSample as error:
        return error.reason


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "gray", "restart markers", "upright by EXIF"])
def test_damaged_files_have_the_same_outcome(kind):
    """Both are accepted with equal pixels, or left out for the same reason; each happens many times."""
    files = list(damaged_files(PLAIN[kind], len(kind)))
    outcomes = [outcome(data, "pillow") for data in files]
    assert [outcome(data, "simplejpeg") for data in files] == outcomes
    reasons = [found for found in outcomes if isinstance(found, str)]
    assert {"truncated image", "unreadable image"} <= set(reasons)
    assert min(len(reasons), len(files) - len(reasons)) > 30


def test_file_that_only_simplejpeg_accepts_is_left_to_pillow(monkeypatch):
    """A decoder that returns another size than the header says is not believed."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: np.zeros((5, 5, 3), np.uint8))
    assert (decoded(PLAIN["gray"], "simplejpeg") == decoded(PLAIN["gray"], "pillow")).all()


@pytest.mark.parametrize("frame", [0xC3, 0xC5, 0xC9, 0xCA])
def test_lossless_and_arithmetic_files_are_left_to_pillow(frame, monkeypatch):
    data = PLAIN["4:2:0"].replace(b"\xff\xc0", bytes([0xFF, frame]), 1)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("simplejpeg got the file"))
    outcome(data, "simplejpeg")


def exact(data, box, size):
    """Pixels by Pillow alone: decoded whole, filtered with the pixels around the box."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("quality", [60, 90])
def test_crops_of_photographs_are_close_to_exact_pillow(quality, decoder):
    """The goal is a mean of .02 of 255; the largest differences are at the rim of the crop, where Pillow looks over."""
    means = []
    for number in range(12):
        width, height = ((500, 375), (640, 480))[number % 2]
        data = encode(photograph(width, height, left=15 * number), quality=quality)
        box = crop_box(width, height, (0.2, 1.0), sample_rng(0, 0, str(number)))
        difference = np.abs(resize(open_image(data), box, 224, Decoding(decoder)) - exact(data, box, 224))
        means.append(difference.mean())
        assert difference.max() < 32
    assert np.mean(means) < 0.02


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_reduced_decoding_stays_close_to_exact_pillow(decoder, scale):
    """The crop is rounded to pixels of the reduced image, so the exact result is that of the rounded crop."""
    data = encode(photograph(1603, 1201), quality=90)
    size = 24 * 8 // scale
    side = 2 * scale * size
    box = (scale, 3 * scale, scale + side, 3 * scale + side)
    image = open_image(data)
    part = decode_part(image, box, size, decoder)
    assert part.shape == (2 * size, 2 * size, 3)
    found = resize(open_image(data), box, size, Decoding(decoder))
    assert np.abs(found - exact(data, box, size)).mean() < 0.4
    smaller = (box[0], box[1], box[2] - 1, box[3])
    whole = decode_part(open_image(data), smaller, size, decoder)
    assert whole.shape[0] > part.shape[0], "one pixel less, and it is not reduced as far"


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("sides", [(1601, 17), (1603, 1201), (33, 800), (9, 9), (1, 1)])
def test_any_crop_can_be_reduced(sides, size):
    """The rounded box stays inside the reduced image and never becomes empty."""
    data = encode(Image.new("RGB", sides, (200, 30, 10)))
    rng = np.random.default_rng(size)
    for _ in range(5):
        left, right = np.sort(rng.choice(sides[0] + 1, 2, replace=False)).tolist()
        top, bottom = np.sort(rng.choice(sides[1] + 1, 2, replace=False)).tolist()
        for box in ((left, top, right, bottom), (0, 0, *sides)):
            pixels = [resize(open_image(data), box, size, Decoding(decoder)) for decoder in ("pillow", "simplejpeg")]
            assert (pixels[0] == pixels[1]).all()
            assert np.abs(pixels[0].astype(int) - [200, 30, 10]).max() < 8


def saved(decoder=None, resampler=None):
    return [{}] if decoder is None else [dict(Decoding(decoder, resampler).position())]


ABSENT = "No module named 'simplejpeg'"
NEW = Decoding("simplejpeg", "torch")
CHOICES = {
    "new": ("auto", (), NEW, NEW._replace(decoder="pillow")),
    "new, Pillow": ("pillow", (), Decoding("pillow"), Decoding("pillow")),
    "new, simplejpeg": ("simplejpeg", (), NEW, ConfigError),
    "of an earlier version": ("auto", saved(), Decoding("pillow", "pillow"), Decoding("pillow", "pillow")),
    "saved with Pillow": ("auto", saved("pillow", "torch"), Decoding("pillow"), Decoding("pillow")),
    "saved with simplejpeg": ("auto", saved("simplejpeg", "torch"), NEW, Decoding("pillow")),
    "other than saved": ("simplejpeg", saved("pillow", "torch"), NEW, ConfigError),
    "Pillow instead of saved": ("pillow", saved("simplejpeg", "torch"), Decoding("pillow"), Decoding("pillow")),
}


@pytest.mark.parametrize("is_installed", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_decoder_is_chosen_once_and_kept(name, is_installed, monkeypatch, caplog):
    setting, positions, present, absent = CHOICES[name]
    expected = present if is_installed else absent
    if not is_installed:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    if expected is ConfigError:
        with pytest.raises(
            ConfigError, match=r"data\.image_decoder \(simplejpeg\) cannot be imported \(.*\): pip inst"
        ):
            choose_decoding(setting, positions)
        return
    with caplog.at_level(logging.WARNING):
        assert choose_decoding(setting, positions) == expected
    before = positions[0].get("data.image_decoder", "pillow") if positions else expected.decoder
    changes = f"{before} decoded the images of this run, {expected.decoder} goes on"
    assert caplog.text.count("\n") == caplog.text.count(changes) == (before != expected.decoder)


def test_only_pixels_that_change_are_warned_of_on_every_rank(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    choose_decoding("pillow", saved("simplejpeg", "torch"))
    assert not caplog.messages
    monkeypatch.setattr(image_decoding.features, "check_feature", lambda name: False)
    choose_decoding("pillow", saved("simplejpeg", "torch"))
    assert len(caplog.messages) == 1


def test_warning_says_whether_pixels_change(monkeypatch, caplog):
    choose_decoding("pillow", saved("simplejpeg", "torch"))
    assert "(data.image_decoder asks for it), with equal pixels" in caplog.text
    monkeypatch.setattr(image_decoding.features, "check_feature", lambda name: False)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    choose_decoding("auto", saved("simplejpeg", "torch"))
    assert "(simplejpeg cannot be imported: import of simplejpeg halted" in caplog.text
    assert "with slightly different pixels, as this Pillow uses another library than libjpeg-turbo" in caplog.text
