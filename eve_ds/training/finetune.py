"""Fine-tuning on a downstream task; the run ends with the plain model and its evaluation, not with a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.checkpoint import manifest, state
from eve_ds.checkpoint.files import PieceReader, write_pieces
from eve_ds.config import Config, ConfigError, TaskConfig
from eve_ds.data.sources import UnusableData
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.distributed import get_logger
from eve_ds.evaluation.predictions import evaluate
from eve_ds.model.eve import Backbone, MoEFactory, initialize_weights
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.parallel.moe import load_plain_state_dict
from eve_ds.parallel.settings import resolve_deepspeed_config
from eve_ds.parallel.startup import initialize_deepspeed_distributed
from eve_ds.tasks.batches import TaskBatch, TaskCollator, training_batches
from eve_ds.tasks.examples import Example
from eve_ds.tasks.formats import load_examples
from eve_ds.tasks.registry import new_task
from eve_ds.tasks.saved import (
    BACKBONE,
    load_task_model,
    save_task_model,
    start_head_weights,
    start_weights,
    task_shapes,
)
from eve_ds.tasks.task import Task
from eve_ds.training.job import Evaluation, Loading
from eve_ds.training.run_folder import check_output_dir, on_rank_zero
from eve_ds.training.start import start
from eve_ds.training.trainer import Trainer

MODEL, EVALUATION = "model", "evaluation"
"""Folders of the output folder."""
EVALUATION_BATCH = 64
SKIPPED = "skipped"
"""Name of a count: examples without a usable image that were replaced."""
MIN_COUNTED = 1000
"""Samples before `data.max_bad_share` counts, so that a few early ones do not stop a run."""


class FinetuneSummary(NamedTuple):
    """Result of a run."""

    steps: int
    samples: int
    train_seconds: float
    metrics: dict[str, Any]
    """Metrics of the last evaluation; empty without one."""
    model: Path
    stopped: bool
    """Stopped by a signal before the end; the same command resumes."""


def finetune(config: Config, deepspeed_config: dict[str, Any] | None = None) -> FinetuneSummary:
    """Fine-tune as `config.task` says, save the model, evaluate it; collective over the ranks that were launched.

    Args:
        config: `train.init` names the weights of the backbone; None draws them.
        deepspeed_config: DeepSpeed's JSON as a dictionary; None means ZeRO 1 with everything "auto".

    Raises:
        ConfigError: settings that contradict each other, data or weights that cannot be used, or a folder that holds
            another run.
        UnusableData: too many examples have no usable image.
        NonFiniteError: a loss or gradient that is not finite.
        SaveError: checkpoints could not be written, time after time.
    """
    info = initialize_deepspeed_distributed()
    examples = load_examples(config, "train")
    load_examples(config, "val")  # its problems are reported now, and not after hours of training
    task = new_task(config, examples)
    examples = task.trainable(examples)
    config = with_schedule(config, len(examples))
    # Stage 0 would refuse to clip where experts are spread over ranks.
    given = {"zero_optimization": {"stage": 1}} if deepspeed_config is None else deepspeed_config
    config, deepspeed_config = resolve_deepspeed_config(given, config, info.world_size)
    job = Finetuning(config, task, examples)
    summary = start(job, config, deepspeed_config)
    return FinetuneSummary(
        steps=summary.steps,
        samples=summary.samples,
        train_seconds=summary.train_seconds,
        metrics={} if summary.stopped else summary.evaluation,
        model=config.train.output_dir / MODEL,
        stopped=summary.stopped,
    )


class Finetuning:
    """Job of fine-tuning; see :class:`eve_ds.training.job.Job`.

    Args:
        config: model, task and loop, with the schedule of :func:`with_schedule`.
        task: downstream task.
        examples: training examples.
    """

    keeps_checkpoints = False

    def __init__(self, config: Config, task: Task, examples: Sequence[Example]) -> None:
        self.config, self.task, self.examples = config, task, examples
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.shapes = task_shapes(task)
        self.num_skipped = 0.0

    def check_folder(self) -> None:
        """Create the output folder, or check that it can be written to; a stopped run resumes, or begins anew.

        Raises:
            ConfigError: it cannot be written, holds the model of a run that has ended, or another run.
        """
        check_output_dir(self.config, "auto")
        out = self.config.train.output_dir
        if (out / MODEL).exists() and not manifest.committed(out):
            raise ConfigError(f"train.output_dir ({out}) holds a fine-tuned model: name another folder, or remove it")

    def build_model(self, moe_cls: MoEFactory, from_checkpoint: bool) -> ModelWithLosses:
        """Model of the task, with weights drawn or from `train.init`."""
        model = self.task.model(moe_cls)
        prepare_weights(model, self.config, self.task)
        return ModelWithLosses(model, self._losses, self.task.loss_weights())

    def _losses(self, output: Any, batch: TaskBatch, counts: Mapping[str, float]) -> dict[str, Tensor]:
        return self.task.losses(output, batch)

    def lr_scale(self) -> Callable[[str], float]:
        """Layer-wise decay, and a factor for the head."""
        task = _task(self.config)
        return partial(
            lr_scale,
            num_layers=self.config.model.num_hidden_layers,
            layer_decay=task.layer_decay,
            head_multiple=task.head_lr_multiple,
            frozen=frozen(self.config),
        )

    def freeze(self, model: nn.Module) -> None:
        """Freeze the backbone where `task.freeze_backbone` says so.

        Called after the engine is built: DeepSpeed refuses a model with experts whose optimizer has none.
        """
        if frozen(self.config):
            model.get_submodule("backbone").requires_grad_(False)

    def open(self, loading: Loading) -> TaskBatches:
        """Examples from the step on; the order follows from the step, so that no position is needed."""
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
        )
        return TaskBatches(batches)

    def counts(self, micro_batches: Sequence[TaskBatch]) -> dict[str, float]:
        """Examples that were replaced."""
        return {SKIPPED: float(sum(batch.skipped.total() for batch in micro_batches))}

    def check_step(self, totals: Mapping[str, float], samples: int) -> None:
        """Raise UnusableData where more than `data.max_bad_share` of the examples were replaced."""
        self.num_skipped += totals[SKIPPED]
        share = self.config.data.max_bad_share
        if samples >= MIN_COUNTED and self.num_skipped > share * (samples + self.num_skipped):
            raise UnusableData(
                f"{self.num_skipped:.0f} of {samples + self.num_skipped:.0f} examples had no usable image, more than "
                f"data.max_bad_share ({share}): check task.train.images; `skipped/REASON` in metrics.jsonl counts them"
            )

    def check_inputs(self, batch: TaskBatch) -> None:
        """Record nothing: no export reads these checkpoints."""

    def forward_flops(self, totals: Mapping[str, float], samples: int) -> None:
        """Not counted."""

    def evaluate(self, trainer: Trainer) -> Evaluation:
        """Save the plain model, and evaluate it on `task.val`; every rank loads it whole."""
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
        """Remove checkpoints, whose place the plain model takes."""
        shutil.rmtree(self.config.train.output_dir / manifest.FOLDER, ignore_errors=True)

    def _save(self, trainer: Trainer) -> None:
        """Write the plain model into `output_dir/model`, from the fp32 masters of all ranks; collective."""
        out = self.config.train.output_dir
        pieces = out / ".pieces"
        on_rank_zero(partial(_new_folder, pieces))
        held = state.pieces_to_write(trainer.engine, trainer.topology)
        masters = [piece for piece in held if piece.kind == "master"]
        write_pieces(pieces / f"tensors-{trainer.topology.rank:05d}.safetensors", masters)
        dist.barrier(group=trainer.host_group)
        provenance = {"init": self.config.train.init, "step": trainer.step, "samples": trainer.samples}
        on_rank_zero(partial(self._assemble, pieces, out / MODEL, provenance))

    def _assemble(self, pieces: Path, out: Path, provenance: dict[str, Any]) -> None:
        reader = PieceReader(pieces)
        weights = {name: reader.read("master", name).view(shape) for name, shape in self.shapes.items()}
        save_task_model(out, self.task, self.config, self.tokenizer, weights, provenance)
        shutil.rmtree(pieces)


class TaskBatches:
    """Training batches of a task, with counts of the examples that were replaced.

    Args:
        batches: endless micro-batches of one data rank.
    """

    def __init__(self, batches: Iterator[TaskBatch]) -> None:
        self._batches = batches
        self._skipped: Counter[str] = Counter()

    def __next__(self) -> TaskBatch:
        """Next micro-batch."""
        batch = next(self._batches)
        self._skipped += batch.skipped
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Examples of this start that were replaced, by reason."""
        return {SKIPPED: dict(self._skipped)}

    def close(self) -> None:
        """End the worker processes."""
        self._batches = iter(())


def with_schedule(config: Config, num_examples: int) -> Config:
    """The configuration with `max_steps` and `warmup_steps` from `task.epochs` and `task.warmup_share`.

    Raises:
        ConfigError: fewer examples than one batch.
    """
    train, task = config.train, _task(config)
    if num_examples < train.train_batch_size:
        raise ConfigError(
            f"train.train_batch_size ({train.train_batch_size}) must not exceed the number of training examples "
            f"({num_examples}): lower it"
        )
    steps = train.max_steps
    if task.epochs is not None:
        steps = min(steps, task.epochs * num_examples // train.train_batch_size)
    warmup = config.optimizer.warmup_steps
    if task.warmup_share is not None:
        warmup = round(task.warmup_share * steps)
    return config.model_copy(
        update={
            "train": train.model_copy(update={"max_steps": steps}),
            "optimizer": config.optimizer.model_copy(update={"warmup_steps": warmup}),
        }
    )


def _task(config: Config) -> TaskConfig:
    if config.task is None:
        raise ConfigError("fine-tuning needs the section `task`: take a recipe, or set task.name")
    return config.task


def prepare_weights(model: nn.Module, config: Config, task: Task) -> None:
    """Draw all weights, then take from `train.init`, if there is one, the backbone and what it has of the head."""
    initialize_weights(model, config.model, int(torch.randint(2**62, (), device="cpu")))
    task.draw_head(model)
    backbone = cast(Backbone, model.get_submodule("backbone"))
    backbone.activation_checkpointing = config.train.activation_checkpointing
    if config.train.compile == "blocks":
        backbone.compile_blocks()
    if config.train.init is not None:
        read = start_weights(config.train.init, config.model)
        load_plain_state_dict(backbone, lambda name: read(BACKBONE + name))
        parameters = dict(model.named_parameters())
        taken = {
            name: weight
            for name, weight in start_head_weights(config.train.init, task.pretrained_names()).items()
            if name in parameters and parameters[name].shape == weight.shape  # else it is the head of another task
        }
        with torch.no_grad():
            for name, weight in taken.items():
                parameters[name].copy_(weight)
        get_logger().info("starting from the backbone%s of %s", " and head" * bool(taken), config.train.init)


def lr_scale(name: str, num_layers: int, layer_decay: float, head_multiple: float, frozen: bool = False) -> float:
    """Factor of a parameter's learning rate: 1 at the last block, times `layer_decay` for each block below it.

    Embeddings lie below the first block, the final LayerNorm counts as the last block, the head has a factor of its
    own (BEiT, `get_num_layer_for_vit`). Of a frozen backbone the factor is 0.
    """
    if name.startswith("head."):
        return head_multiple
    if frozen:
        return 0.0
    parts = name.removeprefix(BACKBONE).split(".")
    if parts[0] == "blocks":
        return layer_decay ** (num_layers - 1 - int(parts[1]))
    return 1.0 if parts[0] == "norm" else layer_decay**num_layers


def frozen(config: Config) -> bool:
    """Whether the backbone stays as it is."""
    return _task(config).freeze_backbone and config.train.init is not None


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
