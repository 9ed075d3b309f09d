"""Base class of pre-training objectives.

An objective makes one or more views of a batch, predicts their hidden parts with its heads, and returns loss terms. To
add one, write a class in a new file of this folder, list it in :mod:`eve_ds.objectives.registry`, and in
:mod:`eve_ds.config` add its name to `Objective` and a weight `NAME_weight` for each loss term to `LossConfig`. Batch
fields and predictions that only one objective has go into the mappings `more` of `Batch` and `EVEOutput`.
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
"""Function: (B, D) rows of this rank -> rows of all ranks, with gradients, and the index of this rank's first row."""
Counts = Mapping[str, float]
"""Denominators of loss terms by name, for one micro-batch or summed over a step."""
TOKENS = "tokens"
"""Key of :data:`Counts` for the tokens that enter the encoder, class tokens included, summed over the views."""


def only_this_rank(rows: Tensor) -> tuple[Tensor, int]:
    """:data:`Gather` for a single process."""
    return rows, 0


class Objective(ABC):
    """Base class of a pre-training objective; stateless."""

    name: str
    """Name in `model.objectives`."""
    min_pairs = 1
    """Smallest micro-batch, in pairs, on which the objective can be computed."""

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Return factories of heads by attribute name of `EVE`; objectives that use one name share the head."""
        return {}

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Choose the hidden parts of the views, as batch fields; they depend on (seed, epoch, sample key, view)."""
        return {}

    @abstractmethod
    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return views by name. `inputs` are keyword arguments of `EVE.forward`; an absent one counts as None."""

    @abstractmethod
    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Predict fields of `EVEOutput` from the encoded views.

        Args:
            model: model with the heads.
            encoded: encoded views by name; a view that this method encodes is added to it.
            inputs: keyword arguments of `EVE.forward`.
            made: fields that earlier objectives predicted.
        """

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the denominators of the loss terms for one micro-batch on the host."""
        return {}

    def late_tokens(self, view_tokens: Mapping[str, float]) -> dict[str, float]:
        """Return encoder tokens, by view, of the views that :meth:`predict` encodes, from those of the other views."""
        return {}

    @abstractmethod
    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return loss terms by name, each () fp32; a term with nothing to predict in the batch is absent.

        Args:
            output: predictions.
            targets: result of `Batch.targets()`.
            counts: denominators, 0 if nothing is predicted: totals over the step divided by R * A, because DeepSpeed
                averages gradients over R ranks and A micro-steps; they may be below 1.
            config: architecture.
            gather: function that collects the rows of all ranks.
        """

    @abstractmethod
    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of one pair's forward; see :func:`eve_ds.objectives.pretraining.pretraining_flops`."""
