"""Train a tiny model for one real step with a DeepSpeed JSON, in this process: data, engine, update and checkpoint."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tiny import tiny_tree

from eve_ds.cli.command import ending
from eve_ds.config import Config, parse_config

TREE: dict[str, Any] = {
    "model": tiny_tree(patch_size=16, num_hidden_layers=2, moe_layers=[1], objectives=["joint"]),
    "data": {"sources": [{"kind": "scenes", "num_samples": 16}], "num_workers": 0},
    "optimizer": {"warmup_steps": 2},
    "train": {"train_batch_size": 4, "max_steps": 1},
}
"""Configuration of the step; `warmup_steps` is set since a run of one step is all warm-up otherwise."""


def small_config(**sections: dict[str, Any]) -> Config:
    """Return `TREE` with further values by section; a section replaces only the keys that it has."""
    return parse_config(TREE | {name: TREE.get(name, {}) | values for name, values in sections.items()})


def one_step(dictionary: dict[str, Any], config: Config) -> dict[str, Any]:
    """Train one step.

    Needs no launcher: the process joins a group of its own, and later calls reuse it.

    Returns:
        `steps` that were trained, `saved`: whether there is a checkpoint, `notes`: log lines about the JSON, and
        `refused`: text of an error that the commands report in one line; without one, None.
    """
    from eve_ds.log import get_logger
    from eve_ds.training import pretrain as pretraining

    folder, lines, handler = Path(tempfile.mkdtemp(prefix="one_step_")), [], logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    train = config.train.model_copy(update={"output_dir": folder / "run"})
    summary, refused = None, None
    try:
        with mock.patch.object(pretraining, "evaluate_scenes", return_value={}), contextlib.chdir(folder):
            summary = pretraining.pretrain(config.model_copy(update={"train": train}), dictionary)
    except Exception as error:
        if ending(error) is None:
            raise
        refused = str(error)
    finally:
        get_logger().removeHandler(handler)
        shutil.rmtree(folder)
    return {
        "steps": None if summary is None else summary.steps,
        "saved": summary is not None and summary.checkpoint is not None,
        "notes": [line for line in lines if "DeepSpeed JSON" in line],
        "refused": refused,
    }
