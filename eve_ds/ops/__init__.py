"""Routing, feed-forward and masked-loss ops: `reference.py` defines correct results, `build.py` picks the version."""

from eve_ds.ops.feed_forward import grouped_feed_forward, quick_gelu
from eve_ds.ops.masked_loss import linear_cross_entropy, masked_pixel_loss
from eve_ds.ops.reference import (
    Routing,
    capacity_share,
    expert_capacity,
    load_balancing_loss,
    patchify,
    slots_of_share,
    sum_groups,
)
from eve_ds.ops.routing import moe_combine, moe_dispatch, route_and_dispatch, route_topk

__all__ = [
    "Routing",
    "capacity_share",
    "expert_capacity",
    "grouped_feed_forward",
    "linear_cross_entropy",
    "load_balancing_loss",
    "masked_pixel_loss",
    "moe_combine",
    "moe_dispatch",
    "patchify",
    "quick_gelu",
    "route_and_dispatch",
    "route_topk",
    "slots_of_share",
    "sum_groups",
]
