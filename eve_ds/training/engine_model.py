"""The model that an engine trains, for evaluation during a run."""

from __future__ import annotations

from typing import Any, cast

from deepspeed import DeepSpeedEngine
from torch import nn

from eve_ds.model.eve import EVE, EVEOutput


class EngineModel(nn.Module):
    """Predicts as :class:`eve_ds.model.eve.EVE` does, but through the engine, which ZeRO 3 needs to gather parameters.

    Args:
        engine: engine whose module is a :class:`eve_ds.model.with_losses.ModelWithLosses`.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        super().__init__()
        self.training = engine.module.training
        self.engine = engine

    def predict(self, **inputs: Any) -> EVEOutput:
        """See :meth:`eve_ds.model.eve.EVE.predict`; a collective of all ranks if the engine partitions parameters."""

        def call(model: EVE) -> EVEOutput:
            output = model.predict(**inputs)
            # Parameters in the output would be empty again when the logits are computed from it.
            return output._replace(vocabulary=output.vocabulary.copied())

        return cast(EVEOutput, self.engine(call=call))
