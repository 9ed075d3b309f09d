"""Learning rate by step and by time."""

from __future__ import annotations

import math

from eve_ds.config import Config


def learning_rate(config: Config, step: int, seconds: float) -> float:
    """Learning rate of the update after `step` updates and `seconds` of training.

    Linear warm-up over `warmup_steps`, times a decay from 1 to `final_lr_share` over the rest of the steps, or over
    the whole time budget with `decay_by: seconds`.
    """
    settings, train = config.optimizer, config.train
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay_by == "seconds" and train.max_seconds is not None:
        progress = seconds / train.max_seconds
    else:
        progress = (step - settings.warmup_steps) / max(train.max_steps - settings.warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    shape = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    decay = settings.final_lr_share + (1 - settings.final_lr_share) * shape[settings.decay]
    return settings.lr * warmup * decay
