"""Retrieval by a pre-trained model as it is: by the heads of ITC and ITM, or by the words that it predicts."""

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
from eve_ds.data.captions import CaptionEncoder
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.eve import model_shapes
from eve_ds.tasks.examples import Example
from eve_ds.tasks.formats import load_examples
from eve_ds.tasks.recipes import SCENES_RECIPES, evaluated_on, task_config
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.saved import TaskModel, read_start
from eve_ds.tasks.words import Template

MAX_LENGTHS = 4
"""Numbers of hidden words that an image is encoded with."""


class ZeroShot(NamedTuple):
    """A pre-trained model in the shape of a fine-tuned one, and what it is asked about."""

    loaded: TaskModel
    examples: Sequence[Example]


def load_zero_shot(
    folder: Path,
    *,
    features: str | None = None,
    data: Sequence[str] | None = None,
    images: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    rerank: int = 0,
) -> ZeroShot:
    """Read a pre-trained model and the examples of a retrieval task.

    Args:
        folder: export, checkpoint or run.
        features: `class_token` or `words`; None: what the objectives have taught, class tokens first.
        data, images, split, limit: of the examples, as :func:`eve_ds.tasks.recipes.evaluated_on` has them.
        rerank: candidates of a query that the model orders again pair by pair; 0: none.

    Raises:
        ConfigError: not a pre-trained model, features that it was not taught, or data that cannot be used.
    """
    start = read_start(folder)
    if start.config.task is not None:
        raise ConfigError(f"{folder} is fine-tuned for {start.config.task.name}: use `evaluate.py task`")
    chosen = _features(start.config.model, features)
    itm = "itm" in start.config.model.objectives
    if chosen == "class_token" and rerank and not itm:
        raise ConfigError(f"--rerank {rerank}: pre-training without itm does not teach it; use --rerank 0")
    settings = [f"task.features={chosen}", f"task.itm_weight={int(chosen == 'class_token' and itm)}"]
    settings.append(f"task.rerank={rerank}")
    recipe = SCENES_RECIPES["retrieval"]  # nothing of it but the name of the task matters here
    config = task_config("retrieval", init=folder, model="", recipe=recipe, overrides=settings)
    config = evaluated_on(config, data, images, split, limit)
    examples = load_examples(config, "val")
    tokenizer = load_tokenizer(start.tokenizer)
    template = None
    if chosen == "words":
        encoder = CaptionEncoder(tokenizer, config.model.text_length)
        template = Template.of((example.text for example in examples), encoder, MAX_LENGTHS)
    task = Retrieval(config, template, centred=True)
    model = task.model()
    weights = _weights(model, folder, start.config.model, task.pretrained_names())
    model.load_state_dict(weights)
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values()))
    return ZeroShot(TaskModel(task, model.eval(), config, tokenizer, digest.hexdigest()), examples)


def _features(config: ModelConfig, asked: str | None) -> str:
    """What pre-training has taught; raises ConfigError where that is not what is asked for, or nothing."""
    taught = ["class_token"] if "itc" in config.objectives else []
    taught += ["words"] if config.predicts_words else []
    names = ", ".join(config.objectives)
    if not taught:
        raise ConfigError(f"pre-training by {names} does not teach retrieval: fine-tune the model first")
    if asked is not None and asked not in taught:
        raise ConfigError(f"--features {asked}: pre-training by {names} does not teach it; use {' or '.join(taught)}")
    return asked or taught[0]


def _weights(model: nn.Module, folder: Path, config: ModelConfig, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of the task's model, out of the pre-trained one; a head that it lacks is not asked, and is 0."""
    shapes = model_shapes(config)
    try:
        read = weight_reader(folder, shapes)
    except CheckpointError as error:
        raise ConfigError(f"--model {error}") from None
    weights = {}
    for name, unset in model.state_dict().items():
        own = next((own for own in names if name.startswith(own)), "")
        source = names.get(own, "") + name.removeprefix(own)
        if name == "head.log_temperature" and own == "":
            weights[name] = unset  # of words, which count as they are
        elif source in shapes:
            weights[name] = read(source).float().contiguous().clone()
        else:
            weights[name] = torch.zeros_like(unset)
    return weights
