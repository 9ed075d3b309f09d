"""All tasks by name. A new task is one class in one folder and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eve_ds.config import Config, ConfigError
from eve_ds.config.loading import nearest
from eve_ds.tasks.examples import Example
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.task import Task, task_section
from eve_ds.tasks.vqa import VQA

TASKS: dict[str, type[Task]] = {task.name: task for task in (VQA, NLVR, Retrieval)}


def named_task(name: str) -> type[Task]:
    """Class of a task; raises ConfigError for an unknown name, with the nearest known one."""
    if name not in TASKS:
        raise ConfigError(f"task.name ('{name}') is no task{nearest(name, list(TASKS))}")
    return TASKS[name]


def task_class(config: Config) -> type[Task]:
    """Class of the task of a configuration.

    Raises:
        ConfigError: no section `task`, an unknown name, or settings that the task refuses.
    """
    task = named_task(task_section(config).name)
    task.check(config)
    return task


def new_task(config: Config, examples: Sequence[Example]) -> Task:
    """The task of `config.task` with the state that it collects from training examples.

    Raises:
        ConfigError: see :func:`task_class`; or the task cannot be learned from the examples.
    """
    return task_class(config).from_examples(config, examples)


def saved_task(config: Config, folder: Path) -> Task:
    """The task of a saved model; raises ConfigError if one of its files cannot be read."""
    return task_class(config).load(config, folder)
