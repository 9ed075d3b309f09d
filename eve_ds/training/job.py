"""Interface between the training loop and its jobs, pre-training and fine-tuning.

A job provides the model with its losses, the batches, the evaluation and the final cleanup; the training loop
(:mod:`eve_ds.training.trainer`) does everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config
from eve_ds.model.eve import MoEFactory
from eve_ds.model.with_losses import ModelWithLosses
from eve_ds.topology import Topology

if TYPE_CHECKING:
    from eve_ds.training.trainer import Trainer


Resume = Literal["auto", "none"] | Path
"""`auto`: resume from the newest checkpoint of `train.output_dir` if one exists. `none`: require a new folder. Path: a
checkpoint of the same run."""


class TrainingBatch(Protocol):
    """Micro-batch of samples."""

    @property
    def keys(self) -> list[str]:
        """Keys of the samples."""

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is copied to the device."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        """Return the batch with every tensor on `device`."""

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""

    def __len__(self) -> int:
        """Return the number of samples."""


class Batches(Protocol):
    """Endless micro-batches of one data rank."""

    read_seconds: float
    """Time that worker processes, or this one, have worked on the micro-batches so far, by the clock."""

    def __next__(self) -> TrainingBatch:
        """Return the next micro-batch; raises :class:`eve_ds.data.sources.UnusableData` if too many samples are bad."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last micro-batch, for JSON; `skipped` counts unusable samples by reason."""

    def close(self) -> None:
        """End worker processes and close files."""


class Loading(NamedTuple):
    """Settings and position for loading micro-batches."""

    topology: Topology
    micro_batch_size: int
    step: int
    """Number of optimizer steps taken."""
    positions: list[dict[str, Any]] | None
    """Positions of all ranks at `step`, in rank order; None at the start of a run."""
    pin_memory: bool
    """Whether to load into page-locked memory, from which copies to a GPU overlap with computation."""
    group: dist.ProcessGroup
    """Host process group of all ranks."""


class Evaluation(NamedTuple):
    """Result of an evaluation within a run."""

    numbers: dict[str, Any]
    """Results for `metrics.jsonl`, as JSON types."""
    summary: str
    """Log line."""


class Summary(NamedTuple):
    """Result of a run."""

    steps: int
    samples: int
    train_seconds: float
    samples_per_second: float
    checkpoint: Path | None
    stopped: bool
    """Whether a signal stopped the run before its end."""
    evaluation: dict[str, Any]
    """Numbers of the last evaluation; empty without one."""


class Job(Protocol):
    """One kind of training."""

    config: Config
    tokenizer: PreTrainedTokenizerFast
    shapes: dict[str, torch.Size]
    """Shape of every tensor of the plain model, by plain name."""
    resume: Resume
    exchanged_views: tuple[str, ...]
    """Names of the views whose numbers of tokens the ranks tell each other before a step, since their experts have a
    capacity and are spread over ranks; empty if nobody needs them."""
    keeps_checkpoints: bool
    """Whether the run ends with a checkpoint; False: with a smaller result, and :meth:`finish` removes checkpoints."""

    def check_folder(self) -> None:
        """Raise ConfigError if `train.output_dir` cannot be used; called on rank 0 only."""

    def build_model(self, moe_cls: MoEFactory, from_checkpoint: bool) -> ModelWithLosses:
        """Build the model with this rank's experts; if `from_checkpoint`, a checkpoint will replace its weights."""

    def lr_scale(self) -> Callable[[str], float] | None:
        """Return a function from a parameter's name to the factor of its learning rate; None: 1 for all parameters."""

    def freeze(self, model: nn.Module) -> None:
        """Turn off gradients of frozen parameters; called after the engine is built."""

    def open(self, loading: Loading) -> Batches:
        """Open the micro-batches of this rank."""

    def counts(self, micro_batches: Sequence[Any]) -> dict[str, float]:
        """Return counts to be summed over ranks before a step; names are the same on every rank and for any batch."""

    def check_step(self, totals: Mapping[str, float], samples: int) -> None:
        """Raise UnusableData if counts of all ranks show too many bad samples; `samples` is the run's number so far."""

    def check_inputs(self, batch: Any) -> Any:
        """Return a few samples of a batch, whose outputs a checkpoint records; None: record nothing."""

    def forward_flops(self, totals: Mapping[str, float], samples: int) -> float | None:
        """Return the FLOPs of one sample's forward, from the counts of `samples` samples; None if not counted."""

    def evaluate(self, trainer: Trainer) -> Evaluation | None:
        """Evaluate the current model; collective. Returns None if this run has nothing to evaluate."""

    def finish(self) -> None:
        """Clean up after the last step; called on rank 0 only."""


def summed_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum counts by name."""
    total: dict[str, float] = {}
    for own in counts:
        for name, value in own.items():
            total[name] = total.get(name, 0.0) + value
    return total
