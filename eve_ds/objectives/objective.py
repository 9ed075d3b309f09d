"""Base class of pre-training objectives.

An objective shows one or more views of a batch, predicts something from them with its heads, and returns loss terms. To
add one, write a class in a new file of this folder, list it in :mod:`eve_ds.objectives.registry`, and in
:mod:`eve_ds.config` add its name to `Objective` and a weight `NAME_weight` for each loss term to `LossConfig`. Batch
fields and predictions that no other objective has travel in the mappings `more` of `Batch` and `EVEOutput`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.views import View

if TYPE_CHECKING:  # these modules use objectives: importing them here would be a cycle
    from eve_ds.data.batch import Batch
    from eve_ds.data.batch_masks import Collated, Masker
    from eve_ds.model.eve import EVE, BackboneOutput, EVEOutput

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""(B, D) rows of this rank -> the rows of all ranks, with gradients, and the index of this rank's first row."""
Counts = Mapping[str, float]
"""Denominators of loss terms by name, for one micro-batch or summed over a step."""
TOKENS = "tokens"
"""Key of :data:`Counts`: tokens that enter the encoder, class tokens included, summed over the views."""


def only_this_rank(rows: Tensor) -> tuple[Tensor, int]:
    """:data:`Gather` for a single process."""
    return rows, 0


class Objective(ABC):
    """One pre-training objective; stateless."""

    name: str
    """Name in `model.objectives`."""
    min_pairs = 1
    """Smallest micro-batch that the objective can be computed on."""

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Modules that predict, as factories by attribute name of `EVE`; objectives share a head by naming it alike."""
        return {}

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Batch fields that say what the views hide; they depend on (seed, epoch, sample key, view) alone."""
        return {}

    @abstractmethod
    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Views by name. `inputs` are keyword arguments of `EVE.forward`; absent ones count as None."""

    @abstractmethod
    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Fields of `EVEOutput`, predicted from the encoded views.

        Args:
            model: provides the heads.
            encoded: encoded views by name; a view that is encoded here is added to it.
            inputs: keyword arguments of `EVE.forward`.
            made: fields that earlier objectives have predicted.
        """

    def counts(self, batch: Batch) -> dict[str, float]:
        """Denominators of the loss terms for one micro-batch on the host."""
        return {}

    def late_tokens(self, view_tokens: Mapping[str, float]) -> dict[str, float]:
        """Encoder tokens of the views that :meth:`predict` encodes, from those of the other views, by name."""
        return {}

    @abstractmethod
    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Loss terms by name, each () fp32; a term without anything to predict in the batch is absent.

        Args:
            output: predictions.
            targets: `Batch.targets()`.
            counts: denominators, 0 without anything to predict: totals over the step divided by R * A, because
                DeepSpeed averages gradients over R ranks and A micro-steps; they may be below 1.
            config: architecture.
            gather: collects the rows of all ranks.
        """

    @abstractmethod
    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of one pair's forward; see :func:`eve_ds.objectives.pretraining.pretraining_flops`."""
