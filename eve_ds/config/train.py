"""Section `train`: the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from eve_ds.config.section import FilePath, PositiveInt, Section
from eve_ds.storage import output_path


class TrainConfig(Section):
    """Training loop: duration, batch, precision, logging, evaluation and checkpoints."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, data order, masks, augmentation and dropout."""
    max_steps: PositiveInt = 480_000
    """Optimizer steps after which the run ends. Default: the paper's for EVE-Base."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of training after which the run ends, evaluation and saving excluded; None: no limit. Wall-clock time on
    an accelerator; on CPUs the CPU time for which rank 0 trains and loads
    (:func:`eve_ds.training.metrics.training_clock`)."""
    train_batch_size: PositiveInt = 2048
    """Samples of one optimizer step over all ranks and micro-steps: micro_batch_size * gradient_accumulation_steps *
    ranks. Default: the paper's."""
    micro_batch_size: PositiveInt | None = None
    """Samples of one forward pass on one rank; None: derived from the other two batch settings."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-steps of one optimizer step; None: derived from the other two batch settings."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of the forward and backward pass; the optimizer updates fp32 master weights."""
    activation_checkpointing: bool = False
    """True: recompute the activations of each block in the backward pass, which saves memory and costs time."""
    pack_views: bool = True
    """True: encode all views of a step that do not depend on each other in one pass over packed tokens. False: one pass
    per view, which lowers peak memory."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: compile every kind of block into one graph with `torch.compile` at the first step, which takes minutes
    unless the cache holds the graphs of an earlier run. Evaluation is not compiled; neither are MoE layers if
    `parallel.ep_size` is above 1. Not with ZeRO 3."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a loss or gradient norm that is not finite; its update is not applied in either case. `stop`: end the
    run. `skip`: continue with the next step. Overflows that the fp16 loss scaler handles do not count."""
    max_nonfinite_skips: PositiveInt = 10
    """Number of non-finite steps that `on_nonfinite: skip` tolerates in a run."""
    log_every: PositiveInt = 50
    """Steps between log lines; a terminal shows a live progress line instead."""
    metrics_every: PositiveInt = 10
    """Steps between training records in metrics.jsonl; `log_every` adds records at its own steps."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; None: only at the end of the run."""
    save_every_steps: PositiveInt | None = None
    """Steps between checkpoints. Without this key and `save_every_minutes`, a checkpoint is written only at the end of
    the run or when a signal stops it."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between checkpoints; can be combined with `save_every_steps`."""
    keep_last: PositiveInt | None = None
    """Number of newest checkpoints to keep; None keeps all."""
    keep_every_steps: PositiveInt | None = None
    """Keep every checkpoint whose step is a multiple of this number, in addition to `keep_last`."""
    async_save: bool = False
    """True: copy the state to host memory and write the checkpoint in a thread while training continues."""
    max_failed_saves: Annotated[int, Field(ge=0)] = 3
    """Number of consecutive failed saves (disk full, no permission) that the run tolerates."""
    timeout_seconds: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    """Longest wait for another rank, in seconds; then the run ends with exit code 6. It must exceed the time by which
    ranks differ, such as that of rank 0 for publishing a checkpoint."""
    output_dir: FilePath = Path("runs/pretrain")
    """Folder of the run: configuration, metrics, checkpoints."""
    init: FilePath | None = None
    """Weights to start a new run from: an export, a checkpoint or a run of the same model; None: random weights."""

    @field_validator("output_dir")
    @classmethod
    def _can_be_written(cls, value: Path) -> Path:
        return output_path(value)

    @property
    def limits(self) -> list[float | None]:
        """`max_steps` and `max_seconds`; the last checkpoint of a run records them as `ended_at`."""
        return [self.max_steps, self.max_seconds]
