"""Initial weights of a task's model, drawn or pre-trained, their learning rates, and whether they are frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from eve_ds.config import Config
from eve_ds.distributed import seed_everything
from eve_ds.log import get_logger
from eve_ds.model.eve import Backbone, initialize_weights
from eve_ds.model.moe import load_plain_state_dict
from eve_ds.tasks.saved import BACKBONE, start_head_weights, start_weights
from eve_ds.tasks.task import Task, task_section


def prepare_weights(model: nn.Module, config: Config, task: Task) -> None:
    """Draw all weights; if `train.init` is set, copy the backbone from it, and the head tensors whose shapes match.

    The draws depend on `train.seed` alone: making a model draws too, by numbers that depend on the kind of MoE layer.
    """
    seed_everything(config.train.seed)
    initialize_weights(model, config.model, int(torch.randint(2**62, (), device="cpu")))
    task.draw_head(model)
    backbone = cast(Backbone, model.get_submodule("backbone"))
    if config.train.init is not None:
        read = start_weights(config.train.init, config.model)
        load_plain_state_dict(backbone, lambda name: read(BACKBONE + name))
        parameters = dict(model.named_parameters())
        taken = {
            name: weight
            for name, weight in start_head_weights(config.train.init, task.pretrained_names()).items()
            if name in parameters and parameters[name].shape == weight.shape  # another task's head may differ
        }
        with torch.no_grad():
            for name, weight in taken.items():
                parameters[name].copy_(weight)
        get_logger().info("starting from the backbone%s of %s", " and head" * bool(taken), config.train.init)


def lr_scale(name: str, num_layers: int, layer_decay: float, head_multiple: float, frozen: bool = False) -> float:
    """Return the factor of a parameter's learning rate: 1 at the last block, times `layer_decay` per block below it.

    Embeddings lie below the first block, the final LayerNorm counts as the last block, and the head has its own factor
    (BEiT, `get_num_layer_for_vit`). The factor of a frozen backbone is 0.
    """
    if name.startswith("head."):
        return head_multiple
    if frozen:
        return 0.0
    parts = name.removeprefix(BACKBONE).split(".")
    if parts[0] == "blocks":
        return layer_decay ** (num_layers - 1 - int(parts[1]))
    return 1.0 if parts[0] == "norm" else layer_decay**num_layers


def is_frozen(config: Config) -> bool:
    """Whether the backbone is frozen; a backbone with drawn weights is always trained."""
    return task_section(config).freeze_backbone and config.train.init is not None


def lr_scales(config: Config) -> Callable[[str], float]:
    """Return :func:`lr_scale` as a function of the parameter's name, with the settings of `task`."""
    task = task_section(config)
    return partial(
        lr_scale,
        num_layers=config.model.num_hidden_layers,
        layer_decay=task.layer_decay,
        head_multiple=task.head_lr_multiple,
        frozen=is_frozen(config),
    )
