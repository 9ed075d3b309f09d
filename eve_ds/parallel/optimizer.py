"""Parameter groups: what decays and what does not, dense and expert parameters apart as DeepSpeed needs them."""

from __future__ import annotations

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

EMBEDDINGS = {"position", "modality", "modality_embedding", "class_token", "mask_token"}
"""Last parts of the names of embeddings that are plain parameters."""


def optimizer_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices decay; biases, norms, LayerScale and embeddings do not.

    Expert parameters get groups of their own, which carry `moe: True` and, as `name`, the process group that their
    gradients are averaged over; DeepSpeed cuts them where they exceed a size, so there may be several of one name.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            embedding = isinstance(module, nn.Embedding) or name in EMBEDDINGS
            bias = name.endswith("bias")  # those of stacked experts have two dimensions
            (no_decay if embedding or bias or parameter.ndim < 2 else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return split_params_into_different_moe_groups_for_optimizer(groups)
