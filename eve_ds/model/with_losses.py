"""Module with a model and its loss terms, which a training engine wraps.

An engine that partitions parameters (ZeRO 3) gathers them for its module's forward alone, and losses need parameters
too: the vocabulary of the masked words, for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eve_ds.model.moe import MoEOutput

Losses = Callable[[Any, Any, Mapping[str, float]], dict[str, Tensor]]
"""(output of the model, batch, denominators) -> loss terms by name, each ()."""


class LossOutput(NamedTuple):
    """Losses of one micro-batch."""

    loss: Tensor
    """() fp32 weighted sum of the terms."""
    terms: dict[str, Tensor]
    """Loss terms by name, each () fp32, without their weights."""
    moe: dict[str, tuple[MoEOutput, ...]]
    """View -> one output per MoE layer, shallow to deep; empty if the model has no separate views."""


class ModelWithLosses(nn.Module):
    """Computes the loss terms of a batch.

    Args:
        model: takes `batch.model_inputs()` as keyword arguments.
        losses: computes the terms.
        weights: weight of every term by name; a term with weight 0 is computed but not trained on.
    """

    def __init__(self, model: nn.Module, losses: Losses, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.losses = losses
        self.weights = weights

    def forward(
        self,
        batch: Any = None,
        counts: Mapping[str, float] = MappingProxyType({}),
        call: Callable[[nn.Module], Any] | None = None,
    ) -> Any:
        """Batch on the device, and the denominators of its loss terms -> :class:`LossOutput`.

        With `call`, a function of the model, return its result instead: other uses of the model, such as evaluation,
        also need an engine that gathers parameters.
        """
        if call is not None:
            return call(self.model)
        output = self.model(**batch.model_inputs())
        terms = self.losses(output, batch, counts)
        moe = output.moe if isinstance(output.moe, dict) else {}
        return LossOutput(weighted_sum(terms, self.weights), terms, moe)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the terms whose weight is above 0, () fp32; `weights` names every term."""
    return torch.stack([weights[name] * term for name, term in terms.items() if weights[name] > 0]).sum()


def plain_model(module: nn.Module) -> nn.Module:
    """The model inside a :class:`ModelWithLosses`, or the module itself."""
    return module.model if isinstance(module, ModelWithLosses) else module
