"""Routing and masked-loss operations; `reference.py` defines what is correct."""

from eve_ds.ops.reference import (
    Routing,
    expert_capacity,
    linear_cross_entropy,
    load_balancing_loss,
    masked_pixel_loss,
    moe_combine,
    moe_dispatch,
    patchify,
    route_topk,
)

__all__ = [
    "Routing",
    "expert_capacity",
    "linear_cross_entropy",
    "load_balancing_loss",
    "masked_pixel_loss",
    "moe_combine",
    "moe_dispatch",
    "patchify",
    "route_topk",
]
