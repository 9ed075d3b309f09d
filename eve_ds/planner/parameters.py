"""Number of parameters that a rank holds, counted on the model itself, built on the meta device."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from eve_ds.config import ModelConfig
from eve_ds.model.eve import EVE
from eve_ds.model.naming import is_stacked, plain_names
from eve_ds.model.shards import Cut, Shard, cut_of


class Held(NamedTuple):
    """Sizes in elements of the parameters that one rank computes with, before ZeRO partitions them."""

    dense_sizes: tuple[int, ...]
    """Tensors that every data-parallel rank computes with, in the order of the model."""
    expert_sizes: tuple[int, ...]
    """Tensors of this rank's experts; those of a layer are stacked."""

    @property
    def dense(self) -> int:
        """Elements that every data-parallel rank computes with."""
        return sum(self.dense_sizes)

    @property
    def experts(self) -> int:
        """Elements of this rank's experts."""
        return sum(self.expert_sizes)

    @property
    def all(self) -> int:
        """All elements."""
        return self.dense + self.experts

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((*self.dense_sizes, *self.expert_sizes))


def model_on_meta(config: ModelConfig) -> EVE:
    """Plain model without storage."""
    with torch.device("meta"):
        return EVE(config)


def count_parameters(model: nn.Module, ep_size: int = 1, tp_size: int = 1) -> Held:
    """Count what a rank holds of a plain model with all experts; the vocabulary is padded to whole shards."""
    dense, experts = [], []
    for name, parameter in model.named_parameters():
        size = math.prod(shard_shape(name, parameter.shape, tp_size))
        if is_stacked(name):
            experts.append(size // ep_size)
        else:
            dense.append(size)
    return Held(tuple(dense), tuple(experts))


def most_touched(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements of the tensors that lie wholly or partly in one of `ranks` equal parts of all tensors, at most."""
    total, ends = sum(sizes), list(accumulate(sizes))
    part = -(-total // ranks)
    return max(
        (
            sum(
                size
                for size, end in zip(sizes, ends, strict=True)
                if end > rank * part and end - size < (rank + 1) * part
            )
            for rank in range(ranks)
        ),
        default=0,
    )


def shard_shape(name: str, shape: torch.Size, tp_size: int) -> torch.Size:
    """Shape of a tensor-parallel rank's part of a parameter of the plain model, which may stack experts."""
    stacked, cut = is_stacked(name), find_cut(name)
    if cut is None:
        return shape
    plain = shape[1:] if stacked else shape
    local = list(plain)
    local[cut.dim] = Shard(plain, cut, 0, tp_size).length * cut.blocks
    return torch.Size([*shape[:1], *local] if stacked else local)


def find_cut(name: str) -> Cut | None:
    """How tensor parallelism cuts a parameter of the plain model; None if every rank holds it whole."""
    try:
        return cut_of(plain_names(name, 0, 1)[0])
    except KeyError:
        return None
