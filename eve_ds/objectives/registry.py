"""Registry of the pre-training objectives by name."""

from __future__ import annotations

from eve_ds.config import ModelConfig
from eve_ds.objectives.contrastive import Contrast, Matching
from eve_ds.objectives.masked_modeling import Joint, MaskedImage, MaskedWords
from eve_ds.objectives.objective import Objective

# Views are encoded and losses are summed in this order. `itm` needs the features of `itc`, so it comes after it.
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (Joint(), MaskedImage(), MaskedWords(), Contrast(), Matching())
}


def objectives_of(config: ModelConfig) -> list[Objective]:
    """Return the objectives that `model.objectives` names, in the order of :data:`OBJECTIVES`."""
    return [objective for name, objective in OBJECTIVES.items() if name in config.objectives]
