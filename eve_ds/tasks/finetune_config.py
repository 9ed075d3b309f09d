"""Configuration of a fine-tuning run: that of the model, a recipe over it, and the command line over both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from eve_ds.config import Config, ConfigError, load_config, parse_config
from eve_ds.data.synthetic.scenes import LevelName
from eve_ds.tasks.registry import named_task, task_class
from eve_ds.tasks.saved import read_start
from eve_ds.tasks.task import no_scenes

LEVELS = get_args(LevelName)
"""Difficulties of generated scenes."""


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
    """Assemble the configuration of a fine-tuning run.

    Args:
        task: name of the task.
        init: source of the backbone; None: drawn.
        model: preset or YAML file of the model if `init` is None or a file of released weights.
        recipe: preset or YAML file; None: the paper's recipe for files, one for minutes on a CPU for scenes.
        train_data: `scenes`, `scenes:hard`, or annotation files; None leaves the data of the recipe.
        val_data: the same for the evaluation; None: as `train_data`.
        images: folder that image names are relative to.
        overrides: `section.key=value`.

    Raises:
        ConfigError: see :func:`eve_ds.config.load_config`; an unknown task, or one without scenes where files
            are missing; settings that the task refuses, an `init` that cannot be read, or a recipe of another task.
    """
    chosen = named_task(task)
    under = _of_model(init, model)
    under["task"] = {"name": task} | {
        section: _source(data, images, flag)
        for section, data, flag in (
            ("train", train_data, "--data"),
            ("val", val_data or train_data, "--val_data" if val_data else "--data"),
        )
        if data is not None
    }
    generated = train_data is None or _is_generated(train_data)
    recipe = recipe or (chosen.scenes_recipe if generated else chosen.recipe)
    if recipe is None:
        raise no_scenes(task)
    config = load_config(recipe, list(overrides), under)
    if config.task is None or config.task.name != task:
        raise ConfigError(f"recipe {recipe} is for the task '{config.task and config.task.name}', not '{task}'")
    task_class(config)
    train = config.train.model_copy(update={"init": init})
    return config.model_copy(update={"train": train, "name": f"{config.name}-{task}"})


def _of_model(init: Path | None, model: str) -> dict[str, Any]:
    """Sections under a recipe: the model and its tokenizer."""
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


def _is_generated(data: Sequence[str]) -> bool:
    return data[0].partition(":")[0] == "scenes"


def _source(data: Sequence[str], images: Path | None, flag: str) -> dict[str, Any]:
    """Section of one set of examples as the option `flag` names it."""
    if _is_generated(data):
        level = data[0].partition(":")[2] or "easy"
        if len(data) > 1:
            raise ConfigError(f"{flag} {' '.join(data)}: scenes cannot be mixed with files")
        if level not in LEVELS:
            raise ConfigError(f"{flag} {data[0]}: the level of scenes must be {' or '.join(LEVELS)}")
        return {"format": "scenes", "level": level}
    for path in data:
        if not Path(path).exists():
            raise ConfigError(f"{flag} {path} does not exist: name annotation files, scenes or scenes:hard")
    source: dict[str, Any] = {"format": "auto", "annotations": [str(path) for path in data]}
    return source if images is None else source | {"images": str(images)}


def evaluated_on(
    config: Config, data: Sequence[str] | None, images: Path | None, split: str | None, limit: int | None
) -> Config:
    """Configuration of a fine-tuned model, with `task.val` from the command line.

    Args:
        config: configuration of the model.
        data: `scenes`, `scenes:hard`, or annotation files; None leaves those of the configuration.
        images: folder that image names are relative to.
        split: split of the data; None leaves it.
        limit: number of examples; None leaves it.

    Raises:
        ConfigError: scenes mixed with files, or no configuration of a fine-tuned model.
    """
    if config.task is None:
        raise ConfigError("the model has no task: fine-tune it first")
    source = config.task.val.model_dump(mode="json") if data is None else _source(data, images, "--data")
    source |= {key: value for key, value in (("split", split), ("num_examples", limit)) if value is not None}
    tree = config.model_dump(mode="json")
    tree["task"]["val"] = source
    return parse_config(tree, "--data")
