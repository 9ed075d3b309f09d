"""RandAugment (Cubuk et al. 2020) and color jitter with torchvision's definitions, on pillow images.

Signs, ranges and the order of draws follow `torchvision.transforms.RandAugment` and `ColorJitter`; the numbers come
from a given generator, so that an image's augmentation depends on its key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

NUM_MAGNITUDES = 31
"""Number of magnitudes, 0 to 30."""

Operation = Callable[[Image.Image, float], Image.Image]


def rand_augment(image: NDArray[np.uint8], num_ops: int, magnitude: int, rng: Generator) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> the same shape after `num_ops` operations drawn with replacement.

    Args:
        image: (H, W, 3) uint8 RGB.
        num_ops: number of operations.
        magnitude: 0 to 30; OPERATIONS holds the strength of each operation at 30.
        rng: draws operations and signs.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    for _ in range(num_ops):
        name = _NAMES[int(rng.integers(len(_NAMES)))]
        apply, largest, signed = OPERATIONS[name]
        strength = largest * magnitude / (NUM_MAGNITUDES - 1)
        if signed and rng.integers(2):
            strength = -strength
        picture = apply(picture, strength)
    return np.asarray(picture)


def color_jitter(image: NDArray[np.uint8], strength: float, rng: Generator) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> brightness, contrast and saturation times 1 +- `strength`, hue shifted by +- a quarter of it.

    The order is random, as in `ColorJitter(strength, strength, strength, strength / 4)`; hue is a share of the circle.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    for step in rng.permutation(4):
        if step == 3:
            picture = _shift_hue(picture, rng.uniform(-strength / 4, strength / 4))
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            picture = enhance(picture).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.asarray(picture)


def _shift_hue(picture: Image.Image, share: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(int(share * 255) % 256)  # wraps around the circle
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(picture: Image.Image, strength: float) -> Image.Image:
    return _affine(picture, (1, strength, 0, 0, 1, 0))


def _shear_y(picture: Image.Image, strength: float) -> Image.Image:
    return _affine(picture, (1, 0, 0, strength, 1, 0))


def _translate_x(picture: Image.Image, strength: float) -> Image.Image:
    return _affine(picture, (1, 0, -int(strength * picture.width), 0, 1, 0))


def _translate_y(picture: Image.Image, strength: float) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, -int(strength * picture.height)))


def _rotate(picture: Image.Image, strength: float) -> Image.Image:
    return picture.rotate(strength, Image.Resampling.NEAREST)


def _enhance(kind: type, picture: Image.Image, strength: float) -> Image.Image:
    return kind(picture).enhance(1 + strength)


def _posterize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(strength))


def _solarize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(picture, 255 - strength)  # type: ignore[arg-type] # a share of it, as torchvision


OPERATIONS: dict[str, tuple[Operation, float, bool]] = {
    "identity": (lambda picture, _: picture, 0.0, False),
    "shear_x": (_shear_x, 0.3, True),
    "shear_y": (_shear_y, 0.3, True),
    "translate_x": (_translate_x, 150 / 331, True),
    "translate_y": (_translate_y, 150 / 331, True),
    "rotate": (_rotate, 30.0, True),
    "brightness": (partial(_enhance, ImageEnhance.Brightness), 0.9, True),
    "color": (partial(_enhance, ImageEnhance.Color), 0.9, True),
    "contrast": (partial(_enhance, ImageEnhance.Contrast), 0.9, True),
    "sharpness": (partial(_enhance, ImageEnhance.Sharpness), 0.9, True),
    "posterize": (_posterize, 4.0, False),
    "solarize": (_solarize, 255.0, False),
    "autocontrast": (lambda picture, _: ImageOps.autocontrast(picture), 0.0, False),
    "equalize": (lambda picture, _: ImageOps.equalize(picture), 0.0, False),
}
"""Name -> operation, its strength at magnitude 30 (shear as slope, shift as share of the side, rotation in degrees,
change of an enhancement's factor, bits removed, values below 255), and whether its sign is drawn."""
_NAMES = tuple(OPERATIONS)
