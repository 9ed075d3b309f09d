"""The training loop of pre-training and fine-tuning, around a DeepSpeed engine.

Before each step all ranks decide together whether it is the last one, and whether a save or a stop follows. A step
accumulates gradients over its micro-batches and updates. While a device computes, the host fetches the micro-batches of
the next step, sums the counts for its losses over ranks, and starts copying the micro-batches to the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from eve_ds.checkpoint.resuming import changed_settings, load
from eve_ds.checkpoint.saving import Content, Saver
from eve_ds.data.errors import UnusableData
from eve_ds.distributed import rank_zero, seed_everything
from eve_ds.log import get_logger
from eve_ds.model.with_losses import LossOutput, plain_model
from eve_ds.signals import StopSignals
from eve_ds.storage import SaveError
from eve_ds.together import on_rank_zero
from eve_ds.topology import Topology
from eve_ds.training.feed import Feed
from eve_ds.training.job import Job, Summary, TrainingBatch
from eve_ds.training.metrics import Metrics, training_clock, training_numbers
from eve_ds.training.nonfinite import NonFiniteError, NonFiniteSteps, poison_if_nonfinite
from eve_ds.training.progress_line import ProgressLine
from eve_ds.training.run_folder import write_config
from eve_ds.training.run_saves import RunSaves
from eve_ds.training.schedule import done_share, ends_after_next_step, learning_rate, save_is_due
from eve_ds.training.window import Window


class Agreement(NamedTuple):
    """Decisions about a step on which all ranks agree before they compute it."""

    done: bool
    """Whether the step is the last one."""
    save_due: bool
    """Whether a checkpoint is due after the step."""
    save_written: bool
    """Whether every rank has written its part of the pending checkpoint."""
    stop: bool
    """Whether some rank got a signal to save after the step and end."""


class Trainer:
    """State of one run: engine, batches, counters; use as a context manager, in which `stop` only records signals."""

    def __init__(
        self, job: Job, engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer, feed: Feed, stop: StopSignals
    ) -> None:
        self.job, self.config, self.engine, self.optimizer, self.feed = job, job.config, engine, optimizer, feed
        self.model = plain_model(engine.module)
        self.topology = Topology.of(self.config.parallel)
        self.step = self.samples = 0
        self.last_batch: TrainingBatch | None = None
        self.seconds = self.lr = 0.0
        self.clock = training_clock(engine.device, feed)
        self.evaluation: dict[str, Any] = {}
        self.done = False  # whether the run has reached its end
        self.stop = stop
        self.host_group = feed.group
        self.nonfinite = NonFiniteSteps(self.config.train, self.topology, self.host_group)
        self.window = Window()
        # Last: a run that could not be built must not claim the folder with its configuration.
        on_rank_zero(partial(write_config, self.config))
        self.metrics = Metrics(self.config.train.output_dir, engine)
        self.saves = RunSaves(Saver(self.config, job.tokenizer, self.host_group), self.metrics)

    def __enter__(self) -> Trainer:
        self.stop.defer()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # All ranks raise these together.
        if kind is not None and issubclass(kind, NonFiniteError):
            self.saves.finish()
        elif kind is not None and issubclass(kind, UnusableData):
            self._save_before_end()
        self.metrics.close()

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of any topology, at whose data position the feed was opened."""
        state = load(self.engine, checkpoint, self.job.shapes, self.topology)
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.nonfinite.skips = state["nonfinite_skips"]
        # The time alone does not tell: a run ends before the step that would exceed its budget.
        self.done = state.get("ended_at") == self.config.train.limits
        self.engine.global_steps, self.engine.global_samples = self.step, self.samples
        self.window = Window(started=self.seconds)
        self.saves.newest = checkpoint
        # Earlier records in the file with larger step numbers belong to updates that were lost.
        message = "; ".join([f"from {checkpoint}", *changed_settings(checkpoint, self.config)])
        self.metrics.write("event", **self._stamp(), event="resumed", message=message)
        get_logger().info("resumed %s", message)

    def run(self) -> Summary:
        """Train until `max_steps` or `max_seconds`; save and evaluate when due and at the end."""
        train, started_at, steps_before, samples_before = self.config.train, self.seconds, self.step, self.samples
        with ProgressLine(train.log_every, self._done_share()) as progress:
            self.done, stopped = self.done or self._done_share() >= 1.0, False
            while not (self.done or stopped):
                with self._clock():
                    agreed = self._train_step()
                if (name := self.stop.take_name()) is not None:
                    get_logger().warning("%s: saving and stopping after this step or the next", name)
                self.done, stopped = agreed.done, agreed.stop and not agreed.done
                written = self.step % train.metrics_every == 0 or self.step % train.log_every == 0
                if (written or self.done or stopped) and self.window.steps:
                    progress.update(self.step, self._done_share(), self._write_metrics())
                if agreed.save_written:
                    self.saves.finish()
                if agreed.save_due or stopped or self.done:
                    self._save()
                if self.done or (train.eval_every and self.step % train.eval_every == 0 and not stopped):
                    self._evaluate()
            if self.step > steps_before and (stopped or self.job.keeps_checkpoints):
                self.saves.finish_last(self.step)
            evaluated = self.job.keeps_checkpoints and self.metrics.has("eval", self.step)
            if self.done and self.step == steps_before and not evaluated:
                self._evaluate()  # the run was killed after its last step, before it wrote its result
        if self.done:
            self.saves.finish()
            on_rank_zero(self.job.finish)
        rate = (self.samples - samples_before) / max(self.seconds - started_at, 1e-9)
        return Summary(self.step, self.samples, self.seconds, rate, self.saves.newest, stopped, self.evaluation)

    def _train_step(self) -> Agreement:
        """Make one optimizer update, with random numbers from (seed, step, data rank); return the ranks' decisions."""
        data = self.feed.take(self.samples)
        if data is None:
            return Agreement(done=False, save_due=False, save_written=False, stop=True)
        agreed = self._agree()
        self.lr = learning_rate(self.config, self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        seed_everything(self.config.train.seed * 1_000_003 + self.step, self.topology.data_rank)
        share = self.topology.data_size * self.engine.gradient_accumulation_steps()
        counts = {name: total / share for name, total in data.totals.items()}
        computed: list[LossOutput] = []
        for _ in data.micro_batches:
            output: LossOutput = self.engine(self.feed.next_batch(), counts)
            self.engine.backward(poison_if_nonfinite(output.loss))
            if self.engine.is_gradient_accumulation_boundary() and not (agreed.done or agreed.stop):
                self.feed.prepare()  # the device is busy now; the update below makes the host wait for it
            self.engine.step()
            computed.append(output)
        self.step += 1
        self.samples += self.engine.train_batch_size()
        self.last_batch = data.micro_batches[-1]
        # ZeRO reports a skipped update on the engine, ZeRO 0 on our optimizer.
        if self.engine.was_step_applied() and not getattr(self.optimizer, "overflow", False):
            self.window.add_step(computed, data.totals)
        else:
            self._skip(computed, data.micro_batches)
        return agreed

    def _agree(self) -> Agreement:
        """Decide with the other ranks, by rank 0's clock, what happens after the step that begins; collective."""
        clocks = [self.seconds, self.saves.seconds_since()] if rank_zero() else [0.0, 0.0]
        numbers = torch.tensor([*clocks, self.saves.saver.written, self.stop.requested], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.host_group)
        self.seconds, since_save, num_written, num_stopped = numbers.tolist()
        return Agreement(
            done=ends_after_next_step(self.config.train, self.step, self.seconds),
            save_due=save_is_due(self.config.train, self.step + 1, since_save),
            save_written=num_written == self.topology.world_size,
            stop=num_stopped > 0,
        )

    def _skip(self, computed: list[LossOutput], micro_batches: list[TrainingBatch]) -> None:
        """Count a step without an update, or raise NonFiniteError; collective."""
        message = self.nonfinite.describe(self.step, computed, micro_batches)
        if message is not None:
            self.metrics.write("event", **self._stamp(), event="nonfinite", message=message)
            self.nonfinite.skip(message, self.saves.newest)

    def _write_metrics(self) -> dict[str, float]:
        numbers: dict[str, Any] = training_numbers(self.window, self.feed, self.engine, self.job, self.seconds)
        numbers["lr"] = self.lr
        skipped = {f"skipped/{reason}": count for reason, count in self.feed.position.get("skipped", {}).items()}
        self.metrics.write("train", **self._stamp(), **numbers, **skipped)
        self.window = Window(started=self.seconds)
        return numbers

    def _evaluate(self) -> None:
        result = self.job.evaluate(self)
        if result is not None:
            self.evaluation = result.numbers
            self.metrics.write("eval", **self._stamp(), **result.numbers)
            get_logger().info("evaluation at step %d: %s", self.step, result.summary)

    def _save(self, wait: bool = False) -> None:
        """Write a checkpoint, unless the last step has one; at the end at once, as the evaluation may be killed."""
        self.saves.finish()
        if self.last_batch is None or self.saves.has(self.step):
            return
        counters = {"samples": self.samples, "seconds": self.seconds, "nonfinite_skips": self.nonfinite.skips}
        ended = {"ended_at": self.config.train.limits} if self.done else {}
        check = self.job.check_inputs(self.last_batch)
        inputs = None if check is None else check.to(self.engine.device).model_inputs()
        content = Content(self.step, counters | ended, self.feed.position, inputs)
        self.saves.begin(self.engine, content, self._stamp(), wait or self.done)

    def _save_before_end(self) -> None:
        """Save the last step if the next one has no data; a failure must not hide that error."""
        try:
            self._save(wait=True)
        except SaveError as error:
            get_logger().error("%s", error)

    def _done_share(self) -> float:
        return done_share(self.config.train, self.step, self.seconds)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started, started_by_clock = self.clock(), time.monotonic()
        yield
        self.seconds += self.clock() - started
        self.window.clock_seconds += time.monotonic() - started_by_clock

    def _stamp(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "samples": self.samples}
