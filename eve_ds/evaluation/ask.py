"""A fine-tuned model asked by a person: questions and statements about an image, captions to rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eve_ds.config import ConfigError
from eve_ds.data.errors import BadSample
from eve_ds.tasks.batches import ImageReader, TaskBatch, TaskCollator
from eve_ds.tasks.examples import Example
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.pair_models import RetrievalModel
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.saved import TaskModel
from eve_ds.tasks.vqa import VQA
from eve_ds.tasks.words import WordRetrievalModel


class Answer(NamedTuple):
    """One answer to a question, the best ones first."""

    question: str
    answer: str
    score: float
    """Probability of the answer (VQA), or of true or false (NLVR)."""


class Match(NamedTuple):
    """A caption and how well it fits, the best one first."""

    caption: str
    similarity: float
    """Cosine of the two features; of a model of words the log-likelihood of the caption's words, all hidden."""
    match: float | None
    """Probability that image and caption belong together; None for a model that was trained without matching."""


@torch.no_grad()
def ask(loaded: TaskModel, images: Sequence[Path], questions: Sequence[str], top: int = 3) -> list[Answer]:
    """The `top` answers of a VQA model to each question, or an NLVR model's judgement of each statement.

    Args:
        loaded: a fine-tuned model.
        images: one, or as many as statements of the model are about.
        questions: one or more.
        top: answers of each.

    Raises:
        ConfigError: a model of another task, an image that cannot be read, or too many or too few of them.
    """
    task = loaded.task
    if isinstance(task, Retrieval):
        raise ConfigError("the model ranks captions and answers no questions: use `evaluate.py rank`")
    batch = _batch(loaded, images, questions, task.num_images if isinstance(task, NLVR) else 1)
    logits = loaded.model(**batch.model_inputs()).logits.float()
    if isinstance(task, VQA):
        scores, names = task.probabilities(logits), task.answers
    else:
        scores, names = logits.softmax(dim=1), ["false", "true"]
    found = []
    for question, row in zip(questions, scores, strict=True):
        best = row.topk(min(top, len(names)))
        found += [Answer(question, names[i], score) for score, i in zip(*map(Tensor.tolist, best), strict=True)]
    return found


@torch.no_grad()
def rank(loaded: TaskModel, image: Path, captions: Sequence[str]) -> list[Match]:
    """Captions by how well they fit the image: by match where the model has learnt it, otherwise by similarity.

    Raises:
        ConfigError: a model of another task, no caption, or an image that cannot be read.
    """
    model = loaded.model
    if not isinstance(model, RetrievalModel | WordRetrievalModel):
        raise ConfigError("the model answers questions and ranks no captions: use `evaluate.py ask`")
    if not captions:
        raise ConfigError("there are 0 captions to rank: give at least one")
    batch = _batch(loaded, [image], captions, 1)
    pixels = batch.normalized_pixels.squeeze(1)
    similarity = model.text_features(batch.input_ids, batch.attention_mask) @ model.image_features(pixels[:1])[0]
    match: list[float | None] = [None] * len(captions)
    if isinstance(model, RetrievalModel) and model.matching:
        match = list(model.match_logits(pixels, batch.input_ids, batch.attention_mask).sigmoid().tolist())
    found = [Match(*item) for item in zip(captions, similarity.tolist(), match, strict=True)]
    return sorted(found, key=lambda item: item.similarity if item.match is None else item.match, reverse=True)


def _batch(loaded: TaskModel, images: Sequence[Path], texts: Sequence[str], needed: int) -> TaskBatch:
    if len(images) != needed:
        raise ConfigError(f"the model looks at {needed} images at once, {len(images)} were given")
    examples = [Example(str(number), tuple(images), text) for number, text in enumerate(texts)]
    try:
        pixels = ImageReader(loaded.config, training=False)(examples[0])
    except BadSample as error:
        raise ConfigError(f"image {' '.join(map(str, images))} cannot be used: {error}") from None
    return TaskCollator(loaded.config, loaded.tokenizer)(examples, [pixels] * len(examples))
