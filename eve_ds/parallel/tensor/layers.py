"""Layers of which a tensor-parallel rank computes a part: linear layers by columns or rows, and split experts.

A column layer gives each rank some of the output channels. A row layer takes these as its input, and the sum of all
ranks' outputs is the result; its bias is added once, after the sum. Between the two, no rank needs another (Shoeybi et
al., 2019, Megatron-LM).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from eve_ds import ops
from eve_ds.model.experts import Experts

CONFIG = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
"""Layers only allocate; their parameters are then replaced. The engine moves them to its device."""


class ColumnLinear(ColumnParallelLinear):
    """Linear layer with this rank's part of the output channels."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, config=CONFIG, init_method=nn.init.zeros_, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F / tp)."""
        out, _ = super().forward(x.flatten(0, -2))  # megatron's backward takes two dimensions
        return out.unflatten(0, x.shape[:-1])


class RowLinear(RowParallelLinear):
    """Linear layer that takes this rank's part of the input channels and returns the sum over ranks."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        options = {"input_is_parallel": True, "skip_bias_add": False}
        super().__init__(in_features, out_features, config=CONFIG, init_method=nn.init.zeros_, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D / tp) -> (..., F)."""
        out, _ = super().forward(x.flatten(0, -2))
        return out.unflatten(0, x.shape[:-1])


class SplitExperts(Experts):
    """Experts with this rank's part of their hidden channels: fc1 by columns, fc2 by rows.

    Args:
        experts: experts with all hidden channels, which no call of this class uses.
        tp_size: number of ranks that share an expert.
    """

    def __init__(self, experts: Experts, tp_size: int) -> None:
        num_experts, hidden_channels, width = experts.fc1_weight.shape
        super().__init__(num_experts, width, hidden_channels // tp_size)
        self.tp_size = tp_size

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """(R, D), (E,) int64 -> (R, D), equal on all ranks; see :meth:`eve_ds.model.experts.Experts.forward`."""
        weights = (self.fc1_weight, self.fc1_bias, self.fc2_weight, ShareOfBias.apply(self.fc2_bias, self.tp_size))
        part = ops.grouped_feed_forward(copy_to_tensor_model_parallel_region(rows), sizes, *weights)
        return reduce_from_tensor_model_parallel_region(part)


class ShareOfBias(torch.autograd.Function):
    """Part of a bias that each rank adds before the ranks' outputs are summed."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, tp_size: int) -> Tensor:
        """Bias of any shape -> the same shape, divided by the number of ranks."""
        return bias / tp_size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient whole: every rank holds the whole bias, whose gradient must be equal on all."""
        return gradient, None
