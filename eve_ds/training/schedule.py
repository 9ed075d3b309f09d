"""Schedules in steps and seconds: learning rate, end of the run, due checkpoints."""

from __future__ import annotations

import math

from eve_ds.config import Config, ConfigError, TrainConfig
from eve_ds.tasks.task import task_section


def learning_rate(config: Config, step: int, seconds: float) -> float:
    """Return the learning rate of the next update, after `step` updates and `seconds` of training.

    The rate is `lr`, times a linear warm-up over `warmup_steps`, times a decay from 1 to `final_lr_share`. The decay
    takes the rest of the steps, or with `decay_by: seconds` the whole time budget.
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


def done_share(train: TrainConfig, step: int, seconds: float) -> float:
    """Return the finished share of the run after `step` updates and `seconds` of training; 1 or more at its end."""
    by_time = seconds / train.max_seconds if train.max_seconds else 0.0
    return max(step / train.max_steps, by_time)


def ends_after_next_step(train: TrainConfig, step: int, seconds: float) -> bool:
    """Whether one more update, if it takes the mean time of the previous ones, reaches `max_steps` or `max_seconds`."""
    if step + 1 >= train.max_steps:
        return True
    if train.max_seconds is None:
        return False
    step_seconds = seconds / step if step else 0.0
    return seconds + step_seconds >= train.max_seconds


def save_is_due(train: TrainConfig, step: int, seconds_since_save: float) -> bool:
    """Whether a checkpoint is due after update `step`, `seconds_since_save` wall-clock seconds after the last one."""
    by_steps = bool(train.save_every_steps and step % train.save_every_steps == 0)
    return by_steps or bool(train.save_every_minutes and seconds_since_save >= 60 * train.save_every_minutes)


def with_schedule(config: Config, num_examples: int) -> Config:
    """Return the configuration with `max_steps` and `warmup_steps` derived from `task.epochs` and `task.warmup_share`.

    Raises:
        ConfigError: the examples are fewer than one batch.
    """
    train, task = config.train, task_section(config)
    if num_examples < train.train_batch_size:
        raise ConfigError(
            f"train.train_batch_size ({train.train_batch_size}) must not exceed the number of training examples "
            f"({num_examples}): lower it"
        )
    steps = train.max_steps
    if task.epochs is not None:
        steps = min(steps, task.epochs * num_examples // train.train_batch_size)
    warmup = config.optimizer.warmup_steps
    if task.warmup_share is not None:
        warmup = round(task.warmup_share * steps)
    return config.model_copy(
        update={
            "train": train.model_copy(update={"max_steps": steps}),
            "optimizer": config.optimizer.model_copy(update={"warmup_steps": warmup}),
        }
    )
