"""Names of the pre-training objectives."""

from __future__ import annotations

from eve_ds.config import ModelConfig
from eve_ds.objectives.contrastive import Contrast, Matching
from eve_ds.objectives.masked_modeling import Joint, MaskedImage, MaskedWords
from eve_ds.objectives.objective import Objective

# In the order in which views are encoded and losses are summed. `itm` needs the features of `itc` before it.
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (Joint(), MaskedImage(), MaskedWords(), Contrast(), Matching())
}


def objectives_of(config: ModelConfig) -> list[Objective]:
    """Objectives that `model.objectives` names, in the order of :data:`OBJECTIVES`."""
    return [objective for name, objective in OBJECTIVES.items() if name in config.objectives]
