"""Retrieval by a pre-trained model without fine-tuning: by the heads of ITC and ITM, or by the words it predicts."""

from __future__ import annotations

from eve_ds.config import ConfigError, ModelConfig

MAX_LENGTHS = 4
"""Largest number of lengths of hidden captions that an image is encoded with."""


def zero_shot_settings(model: ModelConfig, features: str | None, rerank: int) -> list[str]:
    """Overrides of the configuration; see :meth:`eve_ds.tasks.task.Task.zero_shot_settings`."""
    chosen = _taught_features(model, features)
    itm = "itm" in model.objectives
    if chosen == "class_token" and rerank and not itm:
        names = ", ".join(model.objectives)
        raise ConfigError(f"--rerank {rerank} needs a model pre-trained with itm, this one has {names}: use --rerank 0")
    itm_weight = int(chosen == "class_token" and itm)
    return [f"task.features={chosen}", f"task.itm_weight={itm_weight}", f"task.rerank={rerank}"]


def _taught_features(model: ModelConfig, asked: str | None) -> str:
    """Features that pre-training taught, class tokens first; raises ConfigError where it taught none or not `asked`."""
    taught = ["class_token"] if "itc" in model.objectives else []
    taught += ["words"] if model.predicts_words else []
    names = ", ".join(model.objectives)
    if not taught:
        raise ConfigError(f"pre-training by {names} does not teach retrieval: fine-tune the model first")
    if asked is not None and asked not in taught:
        raise ConfigError(f"--features {asked}: pre-training by {names} does not teach it; use {' or '.join(taught)}")
    return asked or taught[0]
