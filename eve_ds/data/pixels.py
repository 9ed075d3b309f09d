"""Conversion of pixels from bytes, as batches carry them, to normalized floats, the input of the model."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels in 0..255 to float32 in -1..1 (mean = std = 0.5) of the same shape, on the same device.

    Floating-point pixels are already normalized and are returned unchanged. Three separate passes instead of a fused
    one, so that a GPU rounds like a CPU.
    """
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)
