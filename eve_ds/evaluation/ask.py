"""Direct use of a fine-tuned model: answer questions, judge statements about an image, or rank captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from eve_ds.config import ConfigError
from eve_ds.data.errors import BadSample
from eve_ds.tasks.batches import ImageReader, TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.saved import TaskModel
from eve_ds.tasks.task import Answer, Match


@torch.no_grad()
def ask(loaded: TaskModel, images: Sequence[Path], questions: Sequence[str], top: int = 3) -> list[Answer]:
    """The `top` answers to each question, or judgments of each statement, best first.

    Args:
        loaded: a fine-tuned model.
        images: images of one example, as many as the model's task has.
        questions: one or more questions or statements.
        top: number of answers to each.

    Raises:
        ConfigError: a model of another task, an image that cannot be read, or a wrong number of images.
    """
    loaded.task.check_command("ask")
    return loaded.task.ask(loaded.model, _batch(loaded, images, questions), top)


@torch.no_grad()
def rank(loaded: TaskModel, image: Path, captions: Sequence[str]) -> list[Match]:
    """Captions, best first: by match if the model was trained for it, otherwise by similarity.

    Raises:
        ConfigError: a model of another task, no caption, or an image that cannot be read.
    """
    loaded.task.check_command("rank")
    if not captions:
        raise ConfigError("no caption to rank: give at least one")
    return loaded.task.rank(loaded.model, _batch(loaded, [image], captions))


def _batch(loaded: TaskModel, images: Sequence[Path], texts: Sequence[str]) -> TaskBatch:
    """The images, repeated for every text."""
    needed = loaded.task.num_images(loaded.config)
    if len(images) != needed:
        raise ConfigError(
            f"--image was given {len(images)} times, the model needs {needed}: give it once per image of a question"
        )
    examples = [Example(str(number), tuple(images), text) for number, text in enumerate(texts)]
    try:
        pixels = ImageReader(loaded.config, training=False)(examples[0])
    except BadSample as error:
        raise ConfigError(f"image {' '.join(map(str, images))} cannot be used: {error}") from None
    return TaskCollator(loaded.config, loaded.tokenizer)(examples, [pixels] * len(examples))
