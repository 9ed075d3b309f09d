"""A pre-training step on generated scenes as one process takes it: micro-batches, denominators, clipping, update."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tiny import tiny_tree
from torch import Tensor

from eve_ds.config import Config, parse_config
from eve_ds.data.batch import Batch
from eve_ds.model.eve import EVE

NUM_SAMPLES, LEARNING_RATE = 8, 1e-2


def step_config(case: Any, model: dict[str, Any], **parallel: Any) -> Config:
    """Configuration of a step on scenes by a tiny model.

    Args:
        case: has `clip`, `micro_steps`, `checkpointing`, `pack_views` and `precision`.
        model: settings of the model that differ from those of :func:`tiny.tiny_tree`.
        parallel: the section `parallel`.
    """
    return parse_config(
        {
            "model": tiny_tree(**model),
            "data": {"sources": [{"kind": "scenes"}]},
            "parallel": parallel,
            "loss": {"load_balancing_weight": 0.1, "router_z_weight": 0.01},
            "optimizer": {"clip_grad_norm": case.clip, "lr": LEARNING_RATE, "weight_decay": 0.1, "eps": 1e-3},
            "train": {
                "train_batch_size": NUM_SAMPLES,
                "gradient_accumulation_steps": case.micro_steps,
                "activation_checkpointing": case.checkpointing,
                "pack_views": case.pack_views,
                "precision": case.precision,
            },
        }
    )


@functools.cache
def _drawn(number: int) -> tuple[Any, Any]:
    """Samples of the step, and the tokenizer of their captions."""
    from eve_ds.data.synthetic.scenes import Scenes
    from eve_ds.data.tokenizer import load_tokenizer
    from eve_ds.evaluation.scenes import samples_of

    scenes = Scenes("easy", 0, "train")
    return samples_of([scenes[index] for index in range(number)]), load_tokenizer("scenes")


def micro_batches(config: Config, part: int = 0, parts: int = 1) -> list[Batch]:
    """Return the micro-batches of one of `parts` equal parts of the samples: of a data rank, or of all.

    With A micro-steps of N samples in all, micro-step a holds samples [N a / A, N (a + 1) / A), part after part.
    """
    from eve_ds.data.collate import Collator
    from eve_ds.objectives.registry import objectives_of

    number, micro_steps = config.train.train_batch_size, config.train.gradient_accumulation_steps
    made, tokenizer = _drawn(number)
    collate = Collator(config, tokenizer, objectives_of(config.model), has_images=True, has_captions=True)
    size = number // micro_steps // parts
    return [
        collate(made[start + part * size : start + (part + 1) * size])
        for start in range(0, number, number // micro_steps)
    ]


def denominators(config: Config, parts: int) -> dict[str, float]:
    """Return the denominators of the losses of one of `parts` parts of the samples in one micro-step."""
    from eve_ds.objectives.pretraining import count
    from eve_ds.training.job import summed_counts

    total = summed_counts(count(batch, config.model) for batch in micro_batches(config))
    return {name: value / parts / config.train.gradient_accumulation_steps for name, value in total.items()}


def _decays(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in {"weight", "fc1_weight", "fc2_weight"} and "norm" not in name and ".word." not in name


def clip_and_update(model: EVE, config: Config) -> float:
    """Clip the gradients of a plain model, take a step of torch's AdamW, and return the norm before clipping."""
    settings = config.optimizer
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm or float("inf"))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if _decays(name)], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if not _decays(name)], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps).step()
    return float(norm)


def difference(ours: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor; the plain norm if all expected values are 0."""
    if ours.shape != expected.shape:
        return float("inf")
    distance, scale = (ours.float() - expected).double().norm(), expected.double().norm()
    return float(distance / scale) if scale > 0 else float(distance)
