"""Losses and gradients that are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_NAMED = 8
"""Sample keys of a micro-batch, and micro-batches, that a message names."""


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; names step, rank and sample keys. Nothing was updated."""


def poison_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, with gradients that are not finite if it is not finite.

    So the one check before the update finds both, and the host need not wait for the loss. A loss can be infinite while
    its gradient is not, as a square can overflow where its derivative does not.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
