"""Pixels as they travel, bytes, and as a model takes them, floats."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1 of the same shape, with mean = std = 0.5; floats are normalized already.

    Computed where the pixels are. Three plain passes and not one fused one, so that a GPU rounds as a CPU does.
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)
