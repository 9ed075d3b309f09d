"""RandAugment and color jitter follow torchvision's definitions and depend on the key alone."""

import hashlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from eve_ds.config import parse_config
from eve_ds.tasks.augment import OPERATIONS, _shift_hue, color_jitter, rand_augment
from eve_ds.tasks.batches import ImageReader
from eve_ds.tasks.examples import Example

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
LEFT_HALF = np.zeros((64, 64, 3), np.uint8)
LEFT_HALF[:, :32] = 255


BY_TORCHVISION = {
    "identity": ("a7633c38a0fb",),
    "shear_x": ("e2d6a2cf7c3b", "8bb9b3c3cf2f"),
    "shear_y": ("e8eb6b70611f", "22f3792accad"),
    "translate_x": ("67e0c55b166e", "0b8133631fff"),
    "translate_y": ("38ec7c3ea66b", "5b01c1063e16"),
    "rotate": ("cba56636b935", "2f9f39e86742"),
    "brightness": ("366b2b65e143", "bf96777f9d94"),
    "color": ("6500d3795253", "acbe119564e5"),
    "contrast": ("9bd7b5d335f9", "d0c6942035d0"),
    "sharpness": ("d91f01fb538d", "099a126b57f4"),
    "posterize": ("2081b2c04644",),
    "solarize": ("768c37399df5",),
    "autocontrast": ("412fe4e885cd",),
    "equalize": ("f753df8652ba",),
}
"""Start of the SHA-256 of `pattern()` after each operation of torchvision 0.28.0 at magnitude 17 of 30, by sign."""
HUE_BY_TORCHVISION = {-0.1: "9fbf42dd08c0", 0.07: "00634d74e49f"}
"""The same for `adjust_hue`, by share of the circle."""


def pattern():
    y, x = np.mgrid[:40, :60]
    return np.stack([(x * 4 + y) % 256, (y * 6 + x * x) % 256, (x * y) % 256], axis=-1).astype(np.uint8) // 2 + 30


def digest(picture):
    return hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()[:12]


def applied(name, magnitude=30, sign=1):
    apply, largest, _ = OPERATIONS[name]
    return np.asarray(apply(Image.fromarray(PICTURE), sign * largest * magnitude / 30))


def test_operations_and_signs_are_those_of_torchvision():
    assert len(OPERATIONS) == 14
    signed = {name for name, (_, _, has_sign) in OPERATIONS.items() if has_sign}
    geometric = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}
    assert signed == geometric | {"brightness", "color", "contrast", "sharpness"}


@pytest.mark.parametrize("name", sorted(BY_TORCHVISION))
def test_every_operation_gives_the_pixels_of_torchvision(name):
    apply, largest, signed = OPERATIONS[name]
    made = [digest(apply(Image.fromarray(pattern()), sign * largest * 17 / 30)) for sign in (1, -1)[: 1 + signed]]
    assert tuple(made) == BY_TORCHVISION[name]


def test_hue_shift_gives_the_pixels_of_torchvision():
    made = {share: digest(_shift_hue(Image.fromarray(pattern()), share)) for share in HUE_BY_TORCHVISION}
    assert made == HUE_BY_TORCHVISION


def test_magnitude_30_has_the_published_strengths():
    """magnitude 30 of 30: shift 150 / 331 of the side, slope 0.3, 30 degrees, factor 1 +- 0.9, 4 bits."""
    shifted = applied("translate_x")
    assert (shifted[:, int(24 * 150 / 331) :] == PICTURE[:, : 24 - int(24 * 150 / 331)]).all()
    assert (shifted[:, : int(24 * 150 / 331)] == 0).all()
    picture = Image.fromarray(PICTURE)
    assert (applied("posterize") == np.asarray(ImageOps.posterize(picture, 4))).all()
    assert (applied("posterize", magnitude=0) == PICTURE).all()
    assert (applied("solarize") == 255 - PICTURE).all()
    assert (applied("brightness", 30, -1) == np.asarray(ImageEnhance.Brightness(picture).enhance(0.1))).all()
    assert (applied("contrast", 15) == np.asarray(ImageEnhance.Contrast(picture).enhance(1.45))).all()
    assert (applied("rotate", 0) == PICTURE).all()
    assert (applied("identity") == PICTURE).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_type(name):
    for sign in (1, -1) if OPERATIONS[name][2] else (1,):
        out = applied(name, 9, sign)
        assert out.shape == PICTURE.shape
        assert out.dtype == np.uint8


def test_augmentation_depends_only_on_the_generator():
    twice = [rand_augment(PICTURE, 2, 9, np.random.default_rng(4)) for _ in range(2)]
    assert (twice[0] == twice[1]).all()
    others = [rand_augment(PICTURE, 2, 9, np.random.default_rng(seed)) for seed in range(8)]
    assert any((other != twice[0]).any() for other in others)


def test_jitter_stays_in_its_range_and_wraps_the_hue():
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    out = np.stack([color_jitter(red, 0.4, np.random.default_rng(seed)) for seed in range(20)]).astype(int)
    assert (color_jitter(red, 0.0, np.random.default_rng(0)) == red).all()
    assert len({tuple(pixel) for pixel in out[:, 0, 0]}) > 10
    assert (out[:, 0, 0, 0] > out[:, 0, 0].min(axis=1)).all()  # never gray


@pytest.mark.parametrize(
    ("text", "answers", "flipped"),
    [("what is it?", ("red",), True), ("what is on the left?", ("red",), False), ("where is it?", ("right",), False)],
)
def test_flips_respect_left_and_right_in_question_and_answer(task_tree, text, answers, flipped):
    config = parse_config(task_tree("vqa") | {"data": {"horizontal_flip": 1.0}})
    image = ImageReader(config, training=True)(Example("1", (LEFT_HALF,), text, answers=answers))[0]
    assert bool(image[0, 0, 0] == 0) == flipped


def test_evaluation_only_resizes_and_training_augments_by_epoch(task_tree):
    config = parse_config(task_tree("vqa", rand_augment_ops=2, color_jitter=0.4) | {"data": {"crop_scale": [0.3, 1.0]}})
    example = Example("1", (LEFT_HALF,), "what?")
    assert (ImageReader(config, training=False)(example)[0] == LEFT_HALF).all()
    reader = ImageReader(config, training=True)
    epochs = [reader(example, epoch) for epoch in (0, 0, 1)]
    assert (epochs[0] == epochs[1]).all()
    assert (epochs[0] != epochs[2]).any()


def test_a_blind_reader_gives_gray_images_in_training_and_evaluation(task_tree):
    config = parse_config(task_tree("nlvr", blind=True))
    example = Example("1", (LEFT_HALF, LEFT_HALF), "a red circle")
    for training in (True, False):
        assert (ImageReader(config, training)(example) == 128).all()
        assert ImageReader(config, training)(example).shape == (2, 64, 64, 3)
