"""Files to examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from eve_ds.config import Config
from eve_ds.tasks.examples import Example, scene_examples


def load_examples(config: Config, section: Literal["train", "val"]) -> Sequence[Example]:
    """Examples of `config.task.train` or `.val`."""
    assert config.task is not None
    source = getattr(config.task, section)
    return scene_examples(config.task.name, source, section)
