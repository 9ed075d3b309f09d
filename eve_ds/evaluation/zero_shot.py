"""Evaluation of a pre-trained model on a task without fine-tuning, as far as pre-training taught the task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.weights import weight_reader
from eve_ds.config import ConfigError, ModelConfig
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import model_shapes
from eve_ds.tasks.examples import Example
from eve_ds.tasks.finetune_config import evaluated_on, task_config
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.registry import named_task
from eve_ds.tasks.saved import TaskModel, read_start


class ZeroShot(NamedTuple):
    """A pre-trained model in the form of a fine-tuned one, and the examples to evaluate it on."""

    loaded: TaskModel
    examples: Sequence[Example]


def load_zero_shot(
    folder: Path,
    *,
    task: str = "retrieval",
    features: str | None = None,
    data: Sequence[str] | None = None,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    rerank: int = 0,
) -> ZeroShot:
    """Read a pre-trained model and the examples of a task.

    Args:
        folder: export, checkpoint or run.
        task: name of the task.
        features: `class_token` or `words`; None: those that the objectives taught, class tokens first.
        data: see :func:`eve_ds.tasks.finetune_config.evaluated_on`, also for `images`, `split` and `limit`.
        images: folder that image names are relative to.
        split: split of the data.
        limit: number of examples.
        rerank: candidates of a query that the model scores again pair by pair; 0: none.

    Raises:
        ConfigError: not a pre-trained model, a task or features that it was not taught, or data that cannot be used.
    """
    start = read_start(folder)
    if start.config.task is not None:
        raise ConfigError(f"{folder} is fine-tuned for {start.config.task.name}: use `evaluate.py task`")
    cls = named_task(task)
    settings = cls.zero_shot_settings(start.config.model, features, rerank)
    # Only the task's name in the recipe has an effect here.
    config = task_config(task, init=folder, model="", recipe=cls.scenes_recipe, overrides=settings)
    config = evaluated_on(config, data, images, split, limit)
    examples = load_examples(config, "val")
    tokenizer = load_tokenizer(start.tokenizer)
    ready = cls.zero_shot(config, examples, tokenizer)
    model = ready.model()
    weights = _weights(model, folder, start.config.model, ready.pretrained_names())
    model.load_state_dict(weights)
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values()))
    return ZeroShot(TaskModel(ready, model.eval(), config, tokenizer, digest.hexdigest()), examples)


def _weights(model: nn.Module, folder: Path, config: ModelConfig, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of the task's model, read from the pre-trained one; those of a head that it lacks are unused and 0."""
    shapes = model_shapes(config)
    try:
        read = weight_reader(folder, shapes)
    except CheckpointError as error:
        raise ConfigError(f"--model {error}") from None
    weights = {}
    for name, unset in model.state_dict().items():
        own = next((own for own in names if name.startswith(own)), "")
        source = names.get(own, "") + name.removeprefix(own)
        if source in shapes:
            weights[name] = read(source).float().contiguous().clone()
        else:
            weights[name] = torch.zeros_like(unset)
    return weights
