"""Section `optimizer`: AdamW and its schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eve_ds.config.section import Fraction, Section, ShareBelowOne


class OptimizerConfig(Section):
    """AdamW and its learning rate schedule: linear warm-up, then decay to `final_lr_share` of the peak."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate. Default: the paper's for EVE-Base."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.98)
    """AdamW decay rates of the first and second moment."""
    eps: Annotated[float, Field(ge=0)] = 1e-8
    """AdamW epsilon, added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW weight decay of matrices; biases, norms, LayerScale and embeddings do not decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    """Optimizer steps of the linear warm-up; 0 turns it off."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after the warm-up; `constant` keeps the peak."""
    decay_by: Literal["steps", "seconds"] = "steps"
    """Progress that the decay follows. `steps`: steps after the warm-up, up to `train.max_steps`. `seconds`: training
    time, up to `train.max_seconds`, for runs with a time budget."""
    final_lr_share: Fraction = 0.0
    """Learning rate at the end of the decay, as a fraction of `lr`."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Maximum norm of the gradient over all parameters; 0 turns clipping off."""
