"""Load-balancing loss and z loss of the routers (EVE eq. 6; Switch Transformer; ST-MoE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eve_ds.model.moe import MoEOutput


def view_router_losses(moe: Mapping[str, Sequence[MoEOutput]], tokens: float) -> dict[str, Tensor]:
    """Compute load-balancing and z loss over the views of a step, each () fp32; empty without MoE layers.

    Each view is balanced separately. The load-balancing loss is the mean over the views that have tokens: a view
    without tokens has loss 0, a view with tokens more. `tokens` is the number of tokens of all views.
    """
    by_view = [router_losses(layers, tokens) for layers in moe.values() if layers]
    if not by_view:
        return {}
    balances = torch.stack([terms["load_balancing"] for terms in by_view])
    balance = balances.sum() / (balances.detach() > 0).sum().clamp(min=1)
    return {"load_balancing": balance, "router_z": torch.stack([terms["router_z"] for terms in by_view]).sum()}


def router_losses(moe: Sequence[MoEOutput], tokens: float) -> dict[str, Tensor]:
    """Compute load-balancing and z loss, each () fp32 and the mean over layers; empty without MoE layers.

    Args:
        moe: one output per MoE layer.
        tokens: number of tokens that the z loss is averaged over.
    """
    if not moe:
        return {}
    balance = torch.stack([layer.load_balancing_loss for layer in moe]).mean()
    z_sum = torch.stack([layer.router_z_sum for layer in moe]).mean()
    return {"load_balancing": balance, "router_z": z_sum / (tokens or 1.0)}
