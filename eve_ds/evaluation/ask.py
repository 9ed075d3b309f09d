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
from eve_ds.tasks.task import Answer, AnswersQuestions, Match, RanksCaptions, Task


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
    task = loaded.task
    if not isinstance(task, AnswersQuestions):
        raise _wrong_command(task)
    return task.ask(loaded.model, _batch(loaded, images, questions), top)


@torch.no_grad()
def rank(loaded: TaskModel, image: Path, captions: Sequence[str]) -> list[Match]:
    """Captions, best first: by match if the model was trained for it, otherwise by similarity.

    Raises:
        ConfigError: a model of another task, no caption, or an image that cannot be read.
    """
    task = loaded.task
    if not isinstance(task, RanksCaptions):
        raise _wrong_command(task)
    if not captions:
        raise ConfigError("no caption to rank: give at least one")
    return task.rank(loaded.model, _batch(loaded, [image], captions))


def _wrong_command(task: Task) -> ConfigError:
    """Error that names the right command for the model of a task."""
    if isinstance(task, AnswersQuestions):
        return ConfigError("the model answers questions and ranks no captions: use `evaluate.py ask`")
    if isinstance(task, RanksCaptions):
        return ConfigError("the model ranks captions and answers no questions: use `evaluate.py rank`")
    return ConfigError("the model neither answers questions nor ranks captions: use `evaluate.py task`")


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
