"""Fine-tuning on a downstream task; a run ends with the plain model and its evaluation, without a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from eve_ds.checkpoint import engine_tensors, manifest
from eve_ds.checkpoint.files import PieceReader, tensor_file, write_pieces
from eve_ds.config import Config, ConfigError
from eve_ds.data.errors import UnusableData
from eve_ds.data.image_decoding import choose_decoding
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.data.workers import start_server
from eve_ds.evaluation.predictions import evaluate
from eve_ds.model.eve import Backbone, MoEFactory
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.parallel.startup import initialize_deepspeed_distributed
from eve_ds.reading import read_json
from eve_ds.signals import StopSignals
from eve_ds.tasks.batches import TaskBatch, TaskCollator, training_batches
from eve_ds.tasks.examples import Example, fingerprint
from eve_ds.tasks.load_examples import load_examples
from eve_ds.tasks.registry import new_task
from eve_ds.tasks.saved import (
    PROVENANCE,
    load_task_model,
    save_task_model,
    task_shapes,
)
from eve_ds.tasks.task import Task
from eve_ds.together import on_every_rank, on_rank_zero
from eve_ds.training.job import Evaluation, Loading, Resume
from eve_ds.training.run_folder import check_output_dir
from eve_ds.training.schedule import with_schedule
from eve_ds.training.start import set_up_backbone, start
from eve_ds.training.task_weights import is_frozen, lr_scales, prepare_weights
from eve_ds.training.trainer import Trainer

MODEL, EVALUATION = "model", "evaluation"
"""Subfolders of the output folder."""
EVALUATION_BATCH = 64
SKIPPED = "skipped"
"""Name of the count of examples that were replaced because they had no usable image."""
EXAMPLES = "examples"
"""Key of a position with the fingerprint of the training examples; earlier versions had none."""
MIN_COUNTED = 1000
"""Number of samples before `data.max_bad_share` applies, so that a few early bad examples do not stop a run."""


class FinetuneSummary(NamedTuple):
    """Result of a fine-tuning run."""

    steps: int
    samples: int
    train_seconds: float
    metrics: dict[str, Any]
    """Metrics of the last evaluation; empty without one."""
    model: Path
    stopped: bool
    """Whether a signal stopped the run before its end; rerun the same command to resume."""


def finetune(
    config: Config, deepspeed_config: dict[str, Any] | None = None, stop: StopSignals | None = None
) -> FinetuneSummary:
    """Fine-tune on `config.task`, save the model, and evaluate it; collective over the ranks that were launched.

    Args:
        config: configuration with a task; `train.init` names the weights of the backbone, None draws them.
        deepspeed_config: DeepSpeed's JSON as a dictionary; None means ZeRO 1 with everything "auto".
        stop: see :func:`eve_ds.training.start.start`.

    Raises:
        ConfigError: settings that contradict each other, data or weights that cannot be used, or a folder that holds
            another run.
        UnusableData: too many examples have no usable image.
        NonFiniteError: a loss or gradient that is not finite.
        SaveError: checkpoints could not be written several times in a row.
    """
    info = initialize_deepspeed_distributed(timedelta(seconds=config.train.timeout_seconds))
    if config.data.num_workers:
        start_server("eve_ds.tasks.batches")
    # Stage 0 cannot clip if experts are spread over ranks.
    given = {"zero_optimization": {"stage": 1}} if deepspeed_config is None else deepspeed_config
    config, deepspeed_config = resolve_deepspeed_config(given, config, info.world_size)
    examples = load_examples(config, "train")
    load_examples(config, "val")  # reports errors now, not after hours of training
    task = new_task(config, examples)
    examples = task.trainable(examples)
    config = with_schedule(config, len(examples))  # needs the batch size, which the JSON may set
    job = Finetuning(config, task, examples)
    summary = start(job, deepspeed_config, stop)
    return FinetuneSummary(
        steps=summary.steps,
        samples=summary.samples,
        train_seconds=summary.train_seconds,
        metrics={} if summary.stopped else summary.evaluation,
        model=config.train.output_dir / MODEL,
        stopped=summary.stopped,
    )


class Finetuning:
    """Fine-tuning job; see :class:`eve_ds.training.job.Job`.

    Args:
        config: settings of model, task and training loop, with the schedule of :func:`with_schedule`.
        task: downstream task.
        examples: training examples.
    """

    keeps_checkpoints = False
    exchanged_views: tuple[str, ...] = ()
    resume: Resume = "auto"

    def __init__(self, config: Config, task: Task, examples: Sequence[Example]) -> None:
        self.config, self.task, self.examples = config, task, examples
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.shapes = task_shapes(task)
        self.num_skipped = 0.0

    def check_folder(self) -> None:
        """Create the output folder, or check that it is writable and belongs to this run, not yet finished.

        A model without a checkpoint beside it is that of a finished run, or of an evaluation within a run that was
        killed later. The latter starts over.

        Raises:
            ConfigError: the folder cannot be written, holds the model of a finished run, or holds another run.
        """
        check_output_dir(self.config, self.resume)
        out = self.config.train.output_dir
        if _is_of_finished_run(out / MODEL) and not manifest.committed(out):
            raise ConfigError(f"train.output_dir ({out}) holds a fine-tuned model: name another folder, or remove it")

    def build_model(self, moe_cls: MoEFactory, from_checkpoint: bool) -> ModelWithLosses:
        """Build the model of the task, with weights drawn or from `train.init`."""
        model = self.task.model(moe_cls)
        prepare_weights(model, self.config, self.task)
        set_up_backbone(cast(Backbone, model.get_submodule("backbone")), self.config.train)
        return ModelWithLosses(model, self._losses, self.task.loss_weights())

    def _losses(self, output: Any, batch: TaskBatch, counts: Mapping[str, float]) -> dict[str, Tensor]:
        return self.task.losses(output, batch)

    def lr_scale(self) -> Callable[[str], float]:
        """Return learning-rate factors with layer-wise decay and a factor for the head."""
        return lr_scales(self.config)

    def freeze(self, model: nn.Module) -> None:
        """Freeze the backbone if `task.freeze_backbone` is set and `train.init` names weights.

        Called after the engine is built: DeepSpeed refuses a model with experts whose optimizer has none.
        """
        if is_frozen(self.config):
            model.get_submodule("backbone").requires_grad_(False)

    def open(self, loading: Loading) -> TaskBatches:
        """Open the examples from the step on; the order depends on the step, so no saved position is needed.

        Raises:
            ConfigError: the checkpoint was written with other examples, or `data.image_decoder` is not installed.
        """
        contents = fingerprint(self.examples)
        for position in loading.positions or []:
            before = position.get(EXAMPLES, contents)
            if before != contents:
                raise ConfigError(
                    f"task.train holds other examples ({contents}) than the checkpoint was written with ({before}): "
                    "restore them, or name another output folder"
                )
        decoding = choose_decoding(self.config.data.image_decoder, loading.positions or ())
        collate = TaskCollator(self.config, self.tokenizer, self.task.targets)
        batches = training_batches(
            self.examples,
            self.config,
            collate,
            step=loading.step,
            rank=loading.topology.data_rank,
            world_size=loading.topology.data_size,
            micro_batch_size=loading.micro_batch_size,
            pin_memory=loading.pin_memory,
            decoding=decoding,
        )
        return TaskBatches(batches, {EXAMPLES: contents} | decoding.position())

    def counts(self, micro_batches: Sequence[TaskBatch]) -> dict[str, float]:
        """Return the number of examples that were replaced."""
        return {SKIPPED: float(sum(batch.skipped.total() for batch in micro_batches))}

    def check_step(self, totals: Mapping[str, float], samples: int) -> None:
        """Raise UnusableData if more than `data.max_bad_share` of the examples were replaced."""
        self.num_skipped += totals[SKIPPED]
        share = self.config.data.max_bad_share
        if samples >= MIN_COUNTED and self.num_skipped > share * (samples + self.num_skipped):
            raise UnusableData(
                f"{self.num_skipped:.0f} of {samples + self.num_skipped:.0f} examples had no usable image, more than "
                f"data.max_bad_share ({share}): check task.train.images; `skipped/REASON` in metrics.jsonl counts them"
            )

    def check_inputs(self, batch: TaskBatch) -> None:
        """Return None: no export reads these checkpoints, so they record no outputs."""

    def forward_flops(self, totals: Mapping[str, float], samples: int) -> None:
        """Return None: FLOPs of tasks are not counted."""

    def evaluate(self, trainer: Trainer) -> Evaluation:
        """Save the plain model and evaluate it on `task.val`; every rank loads the whole model."""
        out = self.config.train.output_dir
        self._save(trainer)
        loaded = load_task_model(out / MODEL)
        numbers = evaluate(
            loaded.task,
            loaded.model.to(trainer.engine.device),
            load_examples(self.config, "val"),
            TaskCollator(loaded.config, loaded.tokenizer),
            out=out / EVALUATION / f"step-{trainer.step:08d}",
            weights=loaded.sha256,
            batch_size=EVALUATION_BATCH,
        )
        return Evaluation(numbers, json.dumps(numbers))

    def finish(self) -> None:
        """Remove the checkpoints, which the plain model replaces."""
        shutil.rmtree(self.config.train.output_dir / manifest.FOLDER, ignore_errors=True)

    def _save(self, trainer: Trainer) -> None:
        """Write the plain model into `output_dir/model`, from the fp32 master weights of all ranks; collective."""
        out = self.config.train.output_dir
        pieces = out / ".pieces"
        on_rank_zero(partial(_new_folder, pieces))
        held = engine_tensors.pieces_to_write(trainer.engine, trainer.topology)
        masters = [piece for piece in held if piece.kind == "master"]
        file = pieces / tensor_file(trainer.topology.rank)
        on_every_rank(lambda: write_pieces(file, masters), trainer.host_group)
        provenance = {
            "init": self.config.train.init,
            "step": trainer.step,
            "samples": trainer.samples,
            "finished": trainer.done,
        }
        on_rank_zero(partial(self._assemble, pieces, out / MODEL, provenance))

    def _assemble(self, pieces: Path, out: Path, provenance: dict[str, Any]) -> None:
        reader = PieceReader(pieces)
        weights = {name: reader.read("master", name).view(shape) for name, shape in self.shapes.items()}
        save_task_model(out, self.task, self.config, self.tokenizer, weights, provenance)
        shutil.rmtree(pieces)


def _is_of_finished_run(model: Path) -> bool:
    """Whether a folder holds a model that no later step of its run would replace; True if it does not tell."""
    try:
        return bool(read_json(model / PROVENANCE).get("finished", True))
    except (OSError, ValueError, AttributeError):
        return model.exists()


class TaskBatches:
    """Training batches of a task, which also count the examples that were replaced.

    Args:
        batches: endless micro-batches of one data rank.
        identity: entries of the position by which a resumed run knows its examples and the decoding of its images.
    """

    def __init__(self, batches: Iterator[TaskBatch], identity: dict[str, str]) -> None:
        self._batches, self._identity = batches, identity
        self._skipped: Counter[str] = Counter()
        self.read_seconds = 0.0

    def __next__(self) -> TaskBatch:
        """Return the next micro-batch."""
        batch = next(self._batches)
        self._skipped += batch.skipped
        self.read_seconds += batch.read_seconds
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of examples replaced since this start of the run, by reason, and the identity."""
        return {SKIPPED: dict(self._skipped), **self._identity}

    def close(self) -> None:
        """End the worker processes."""
        self._batches = iter(())


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
