"""AdamW and its parameter groups, by weight decay, learning rate and, for DeepSpeed, dense or expert parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from eve_ds.config import Config

EMBEDDINGS = {"position", "modality", "modality_embedding", "class_token", "mask_token"}
"""Last name parts of the embeddings that are plain parameters."""
WORD_EMBEDDING = "text_embedding.word.weight"
"""End of the name of the word embedding."""


def build_optimizer(
    model: nn.Module,
    config: Config,
    deepspeed_config: dict[str, Any],
    lr_scale: Callable[[str], float] | None = None,
) -> torch.optim.AdamW:
    """Build AdamW over decaying, non-decaying and expert parameters; weight decay is always set explicitly.

    Args:
        model: plain or DeepSpeed model, without its losses.
        config: configuration, of which `optimizer` is used.
        deepspeed_config: resolved configuration of DeepSpeed, of which the ZeRO stage is used.
        lr_scale: see :func:`optimizer_parameter_groups`.
    """
    settings = config.optimizer
    cls = CheckedAdamW if deepspeed_config["zero_optimization"]["stage"] == 0 else torch.optim.AdamW
    return cls(
        optimizer_parameter_groups(model, settings.weight_decay, lr_scale),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over weights, gradients and moments instead of ten
    )


def optimizer_parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Return groups for AdamW: matrices decay; biases, norms, LayerScale and embeddings do not.

    Expert parameters get groups of their own, with `moe: True` and, as `name`, the process group over which their
    gradients are averaged. DeepSpeed splits these groups above a size limit, so several may have one name.

    Args:
        model: plain or DeepSpeed model, without its losses.
        weight_decay: weight decay of matrices.
        lr_scale: function from a parameter's name to the factor of its learning rate, which its group stores as
            `lr_scale`; None: 1 for all.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if lr_scale is None else lr_scale(name)
        key = (_decays(name, parameter), scale)
        groups.setdefault(key, _empty_group(*key, weight_decay))["params"].append(parameter)
    # Decaying groups first, so that the order does not depend on which parameter the model names first.
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (not key[0], -key[1]))]
    return split_params_into_different_moe_groups_for_optimizer(ordered)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix; the name decides too, since biases of stacked experts have two dimensions."""
    kind = name.rpartition(".")[2]
    return parameter.ndim >= 2 and not (kind in EMBEDDINGS or kind.endswith("bias") or name.endswith(WORD_EMBEDDING))


def _empty_group(decays: bool, scale: float, weight_decay: float) -> dict[str, Any]:
    name = "decay" if decays else "no_decay"
    return {
        "name": name if scale == 1 else f"{name} x {scale:g}",
        "params": [],
        "weight_decay": weight_decay if decays else 0.0,
        "lr_scale": scale,
    }


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that refuses an update with a non-finite gradient on any rank, as ZeRO's optimizers do.

    DeepSpeed at ZeRO 0 in fp32 would apply such an update. The engine reads the attribute `overflow`.
    """

    overflow = False

    def step(self, closure: Any = None) -> Any:
        """Update; if a gradient of any rank is not finite, set `overflow` and change nothing. Collective."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self.overflow = not bool(finite)
        return None if self.overflow else super().step(closure)
