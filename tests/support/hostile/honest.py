"""Honest folders, of which cases damage copies."""

from __future__ import annotations

from pathlib import Path

from drawn_run import write_run
from tiny import MODEL

from eve_ds.config import parse_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import export
from eve_ds.model.eve import initialize_weights
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.registry import new_task
from eve_ds.tasks.saved import save_task_model


def write_honest(folder: Path) -> Path:
    """Write a `run` with one checkpoint, its `export`, and a model for questions, `task`; return the folder."""
    checkpoint, _ = write_run(folder / "run")
    export(checkpoint, folder / "export")
    config = parse_config({"model": MODEL, "task": {"name": "vqa", "val": {"num_examples": 4}}})
    task = new_task(config, load_examples(config, "val"))
    model = task.model()
    initialize_weights(model, config.model, seed=3)
    save_task_model(folder / "task", task, config, load_tokenizer("scenes"), model.state_dict(), {})
    return folder
