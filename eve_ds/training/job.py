"""Interface between the training loop and a kind of training: pre-training or fine-tuning.

A job brings the model with its losses, batches, evaluation, and what is kept at the end; the loop
(:mod:`eve_ds.training.trainer`) brings everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config
from eve_ds.model.eve import MoEFactory
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.topology import Topology

if TYPE_CHECKING:
    from eve_ds.training.trainer import Trainer


class TrainingBatch(Protocol):
    """Micro-batch of samples."""

    @property
    def keys(self) -> list[str]:
        """Key of each sample."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that travels to the device."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """The same batch with every tensor on `device`."""

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""

    def __len__(self) -> int:
        """Number of samples."""


class Batches(Protocol):
    """Endless micro-batches of one data rank."""

    def __next__(self) -> TrainingBatch:
        """Next micro-batch; raises :class:`eve_ds.data.sources.UnusableData` where too much of the data is bad."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position after the last micro-batch; `skipped` counts unusable samples by reason."""

    def close(self) -> None:
        """End worker processes and close files."""


class Loading(NamedTuple):
    """How micro-batches are to be loaded."""

    topology: Topology
    micro_batch_size: int
    step: int
    """Optimizer steps taken."""
    positions: list[dict[str, Any]] | None
    """Positions of all ranks at that step, in rank order; None at the start of a run."""
    pin_memory: bool
    """Load into page-locked memory, from which copies to a GPU overlap with computation."""


class Evaluation(NamedTuple):
    """Result of an evaluation within a run."""

    numbers: dict[str, Any]
    """JSON-able; written to `metrics.jsonl`."""
    summary: str
    """One line for the log."""


class Summary(NamedTuple):
    """Result of a run."""

    steps: int
    samples: int
    train_seconds: float
    samples_per_second: float
    checkpoint: Path | None
    stopped: bool
    """Stopped by a signal before the end."""
    evaluation: dict[str, Any]
    """Numbers of the last evaluation; empty without one."""


class Job(Protocol):
    """One kind of training."""

    config: Config
    tokenizer: PreTrainedTokenizerFast
    shapes: dict[str, torch.Size]
    """Shape of every tensor of the plain model, by plain name."""
    keeps_checkpoints: bool
    """Whether the run ends with a checkpoint; False: with something smaller that :meth:`finish` writes."""

    def check_folder(self) -> None:
        """Raise ConfigError where `train.output_dir` cannot be used; called on rank 0 alone."""

    def build_model(self, moe_cls: MoEFactory, from_checkpoint: bool) -> ModelWithLosses:
        """Model with the experts of this rank; weights that a checkpoint will replace need not be read."""

    def lr_scale(self) -> Callable[[str], float] | None:
        """Factor of a parameter's learning rate by its name; None: 1 for all."""

    def freeze(self, model: nn.Module) -> None:
        """Turn off gradients of parameters that stay as they are, once the engine is built."""

    def open(self, loading: Loading) -> Batches:
        """Micro-batches of this rank."""

    def counts(self, micro_batches: Sequence[Any]) -> dict[str, float]:
        """Numbers that are summed over ranks before a step; the same names on every rank, whatever the batches hold."""

    def check_step(self, totals: Mapping[str, float], samples: int) -> None:
        """Raise UnusableData where the counts of all ranks, and the samples of the run so far, say to stop."""

    def check_inputs(self, batch: Any) -> Any:
        """A few samples of a batch, whose outputs a checkpoint records; None records nothing."""

    def forward_flops(self, totals: Mapping[str, float], samples: int) -> float | None:
        """FLOPs of the forward of one sample, from the counts of some samples; None where they are not counted."""

    def evaluate(self, trainer: Trainer) -> Evaluation | None:
        """Evaluate the model of the step; collective. None: this run has nothing to evaluate."""

    def finish(self) -> None:
        """Clean up after the last step; rank 0 alone."""


def summed_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of counts by name."""
    total: dict[str, float] = {}
    for own in counts:
        for name, value in own.items():
            total[name] = total.get(name, 0.0) + value
    return total
