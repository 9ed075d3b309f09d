"""Section `loss`: weights of the loss terms."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from eve_ds.config.section import Section, renamed


class LossConfig(Section):
    """Weights of the loss terms; weights of objectives that are not in `model.objectives` have no effect."""

    mim_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-pixel loss, used by `mim` and `joint`."""
    mlm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-word loss, used by `mlm` and `joint`."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the image-text contrastive loss, used by `itc` in pre-training."""
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the image-text matching loss, used by `itm` in pre-training."""
    load_balancing_weight: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the load-balancing loss of the routers, in pre-training and fine-tuning."""
    router_z_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router z-loss, in pre-training and fine-tuning; 0 turns it off."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, tree: Any) -> Any:
        return renamed(renamed(tree, "pixel_weight", "mim_weight"), "text_weight", "mlm_weight")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term by name."""
        return {name.removesuffix("_weight"): getattr(self, name) for name in type(self).model_fields}
