"""Checkpoints of a run: begin a save, publish it when all ranks have written it, and record it in the metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from eve_ds.checkpoint.manifest import name_of
from eve_ds.checkpoint.saving import Content, Saver
from eve_ds.log import get_logger
from eve_ds.storage import SaveError
from eve_ds.training.metrics import Metrics


class RunSaves:
    """Saves of a run; all methods except `seconds_since` are collective over all ranks.

    Args:
        saver: writes the checkpoints.
        metrics: gets a record of every finished save.

    Attributes:
        newest: the newest checkpoint that this start of the run has read or written; None: there is none yet.
    """

    def __init__(self, saver: Saver, metrics: Metrics) -> None:
        self.newest: Path | None = None
        self.saver = saver
        self._metrics = metrics
        self._begun_at = time.monotonic()
        self._stamp: dict[str, Any] = {}

    def seconds_since(self) -> float:
        """Return the seconds since the last save began, or since the start."""
        return time.monotonic() - self._begun_at

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is that of a step."""
        return self.newest is not None and self.newest.name == name_of(step)

    def begin(self, engine: DeepSpeedEngine, content: Content, stamp: Mapping[str, Any], wait: bool) -> None:
        """Write a checkpoint; with `train.async_save` only start it, for :meth:`finish` to publish.

        Args:
            engine: engine that trains.
            content: content besides the state of the engine.
            stamp: fields of the record in the metrics: step, seconds and samples.
            wait: whether to publish it at once in any case.
        """
        self.finish()
        self._stamp = dict(stamp)
        self.saver.begin(engine, content)
        if wait or not self.saver.config.train.async_save:
            self.finish()
        self._begun_at = time.monotonic()

    def finish(self) -> None:
        """Publish the save that has begun, if any.

        Raises:
            SaveError: more failures in a row than `train.max_failed_saves`.
        """
        saved = self.saver.finish()
        if saved is not None:
            self.newest = saved.folder
            size, stall = saved.bytes, saved.stall_seconds
            self._metrics.write("save", **self._stamp, checkpoint=saved.folder.name, stall_seconds=stall, bytes=size)
            get_logger().info("saved %s", saved.folder)

    def finish_last(self, step: int) -> None:
        """Wait for the checkpoint of the last step, after which the run makes no other attempt to save.

        Raises:
            SaveError: the checkpoint could not be written.
        """
        self.finish()
        if not self.has(step):
            newest = "and without another one" if self.newest is None else f"the newest is {self.newest}"
            raise SaveError(
                f"the run ends at step {step} without a checkpoint of it, {newest}: make room or change "
                "permissions, and rerun the same command to compute the missing steps"
            )
