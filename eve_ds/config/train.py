"""Losses, optimizer, parallelism and the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eve_ds.config.section import Fraction, PositiveInt, Section, renamed


class LossConfig(Section):
    """Weights of the loss terms; those of tasks that `model.objectives` does not name count for nothing."""

    mim_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of masked pixels, in `mim` and in `joint`."""
    mlm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of masked words, in `mlm` and in `joint`."""
    itc_weight: Annotated[float, Field(ge=0)] = 1.0
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    load_balancing_weight: Annotated[float, Field(ge=0)] = 0.001
    router_z_weight: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, tree: Any) -> Any:
        return renamed(renamed(tree, "pixel_weight", "mim_weight"), "text_weight", "mlm_weight")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term by name."""
        return {name.removesuffix("_weight"): getattr(self, name) for name in type(self).model_fields}


class OptimizerConfig(Section):
    """AdamW and its schedule: linear warm-up, then decay to `final_lr_share` of the peak."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    decay: Literal["linear", "cosine", "constant"] = "linear"
    decay_by: Literal["steps", "seconds"] = "steps"
    """`seconds`: the decay follows training time against `train.max_seconds`, for runs with a time budget."""
    final_lr_share: Fraction = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 turns clipping off."""


class ParallelConfig(Section):
    """How experts are spread."""

    ep_size: Annotated[int, Field(ge=0)] = 1
    """Ranks that share one full set of experts; 0 takes the most that divide both the ranks and the experts."""


class TrainConfig(Section):
    """The loop: how long, how large, what is written when."""

    seed: int = 0
    max_steps: PositiveInt = 480_000
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop after this much training time, without evaluation and saving: of the wall's clock on an accelerator, of the
    training thread of rank 0 on CPUs (:func:`eve_ds.training.progress.training_clock`)."""
    train_batch_size: PositiveInt = 2048
    """Samples of one optimiser step over all ranks and micro-steps."""
    micro_batch_size: PositiveInt | None = None
    """Samples of one forward on one rank; None: what the other two sides of the triangle leave."""
    gradient_accumulation_steps: PositiveInt | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    pack_views: bool = True
    """Encode the views of a step that do not wait for each other in one pass over packed tokens; False: in a pass
    each, which needs less memory at a time."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: let `torch.compile` make one graph of every kind of block, at the first step; that takes minutes unless
    an earlier run has left them in a cache. MoE layers stay as they are where `parallel.ep_size` is above 1, and so
    does evaluation."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite_skips: PositiveInt = 10
    log_every: PositiveInt = 50
    """Steps between plain log lines (not on a terminal)."""
    metrics_every: PositiveInt = 10
    eval_every: PositiveInt | None = None
    save_every_steps: PositiveInt | None = None
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep_last: PositiveInt | None = None
    """Checkpoints to keep, the newest ones; None keeps all."""
    keep_every_steps: PositiveInt | None = None
    """Keep those of every so many steps for good."""
    async_save: bool = False
    """Copy the state to the host's memory and write it while training goes on."""
    max_failed_saves: Annotated[int, Field(ge=0)] = 3
    """Failed saves in a row (disk full, no permission) that a run survives."""
    output_dir: Path = Path("runs/pretrain")
    init: Path | None = None
    """Weights to start a new run from: an exported folder, a checkpoint or a run of the same model."""
