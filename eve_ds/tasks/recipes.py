"""The configuration of a fine-tuning run: the model's own, a recipe over it, the command line over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eve_ds.config import Config, ConfigError, load_config, parse_config
from eve_ds.tasks.saved import read_start

RECIPES = {"vqa": "tasks/vqa", "nlvr": "tasks/nlvr2", "retrieval": "tasks/retrieval_coco"}
"""Of the paper's fine-tuning, for data from files."""
SCENES_RECIPES = {name: f"tasks/scenes_{name}" for name in RECIPES}


def task_config(
    task: str,
    *,
    init: Path | None,
    model: str,
    recipe: str | None = None,
    train_data: Sequence[str] | None = None,
    val_data: Sequence[str] | None = None,
    images: Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Put a fine-tuning configuration together.

    Args:
        task: `vqa`, `nlvr` or `retrieval`.
        init: where the backbone comes from; None: drawn.
        model: preset or YAML file of the model where `init` is None or a file of released weights.
        recipe: preset or YAML file; None: the paper's for files, one for minutes on a CPU for scenes.
        train_data, val_data: `scenes`, `scenes:hard`, or annotation files; None leaves what the recipe says.
        images: folder that image names are relative to.
        overrides: `section.key=value`.

    Raises:
        ConfigError: see :func:`eve_ds.config.load_config`; `init` cannot be read, or the recipe is of another task.
    """
    under = _of_model(init, model)
    under["task"] = {"name": task} | {
        section: _source(data, images)
        for section, data in (("train", train_data), ("val", val_data or train_data))
        if data is not None
    }
    scenes = train_data is None or train_data[0].startswith("scenes")
    chosen = recipe or (SCENES_RECIPES if scenes else RECIPES)[task]
    config = load_config(chosen, list(overrides), under)
    if config.task is None or config.task.name != task:
        raise ConfigError(f"recipe {chosen} is for the task '{config.task and config.task.name}', not '{task}'")
    train = config.train.model_copy(update={"init": init})
    return config.model_copy(update={"train": train, "name": f"{config.name}-{task}"})


def _of_model(init: Path | None, model: str) -> dict[str, Any]:
    """What a recipe lies over: the model and its tokenizer."""
    if init is not None and not init.exists():
        raise ConfigError(f"--init {init} does not exist: name an export, a run, a checkpoint, a file, or none")
    if init is None or init.is_file():
        config, tokenizer = load_config(model), None
    else:
        config, tokenizer = read_start(init)
    return {
        "name": config.name,
        "model": config.model.model_dump(mode="json"),
        "data": {"tokenizer": tokenizer or config.data.tokenizer},
    }


def _source(data: Sequence[str], images: Path | None) -> dict[str, Any]:
    """The section of one set of examples, from the command line."""
    kind, _, level = data[0].partition(":")
    if kind == "scenes":
        if len(data) > 1:
            raise ConfigError(f"--data {' '.join(data)}: scenes cannot be mixed with files")
        return {"format": "scenes", "level": level or "easy"}
    source: dict[str, Any] = {"format": "auto", "annotations": [str(path) for path in data]}
    return source if images is None else source | {"images": str(images)}


def evaluated_on(
    config: Config, data: Sequence[str] | None, images: Path | None, split: str | None, limit: int | None
) -> Config:
    """The configuration of a fine-tuned model whose `task.val` is what the command line says.

    Raises:
        ConfigError: scenes mixed with files, or no configuration of a fine-tuned model.
    """
    if config.task is None:
        raise ConfigError("the model has no task: fine-tune it first")
    source = config.task.val.model_dump(mode="json") if data is None else _source(data, images)
    source |= {key: value for key, value in (("split", split), ("num_examples", limit)) if value is not None}
    tree = config.model_dump(mode="json")
    tree["task"]["val"] = source
    return parse_config(tree, "--data")
