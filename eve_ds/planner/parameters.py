"""Number of parameters that a rank holds, counted on the model itself, built on the meta device."""

from __future__ import annotations

import math
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


class Cutting(NamedTuple):
    """How tensor parallelism cuts the parameters of the plain model."""

    tp_size: int = 1
    split_experts: bool = False

    def find(self, name: str) -> Cut | None:
        """Cut of a parameter; None if every rank holds it whole."""
        if is_stacked(name) and not self.split_experts:
            return None
        return cut_of(plain_names(name, 0, 1)[0])

    def shape(self, name: str, shape: torch.Size) -> torch.Size:
        """Shape of a rank's part of a parameter, which may stack experts."""
        cut = self.find(name)
        if cut is None:
            return shape
        stacked = shape[:1] if is_stacked(name) else torch.Size()
        plain = shape[len(stacked) :]
        return stacked + Shard(plain, cut, 0, self.tp_size).local_shape


def model_on_meta(config: ModelConfig) -> EVE:
    """Plain model without storage."""
    with torch.device("meta"):
        return EVE(config)


def count_parameters(model: nn.Module, ep_size: int = 1, cutting: Cutting | None = None) -> Held:
    """Count what a rank holds of a plain model with all experts; the vocabulary is padded to whole shards."""
    cutting = cutting or Cutting()
    dense, experts = [], []
    for name, parameter in model.named_parameters():
        size = math.prod(cutting.shape(name, parameter.shape))
        if is_stacked(name):
            experts.append(size // ep_size)
        else:
            dense.append(size)
    return Held(tuple(dense), tuple(experts))
