"""Steps with a loss or gradient that is not finite: detection, one-line description, skip or stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.config import TrainConfig
from eve_ds.log import get_logger
from eve_ds.model.with_losses import LossOutput
from eve_ds.topology import Topology
from eve_ds.training.job import TrainingBatch
from eve_ds.training.window import all_terms

MOST_NAMED = 8
"""Maximum number of sample keys per micro-batch, and of micro-batches, that a message names."""
CROSS_RANK_TERMS = ("loss", "load_balancing", "itc")
"""Loss terms that samples of other ranks can make non-finite."""


class NonFiniteError(RuntimeError):
    """Non-finite loss or gradient norm; the message names step, rank and sample keys. Nothing was updated."""


def poison_if_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss; if it is not finite, its gradients become non-finite too.

    One check of the gradients before the update then finds both cases, and the host need not wait for the loss. A loss
    can be infinite with a finite gradient: a square overflows where its derivative does not.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class NonFiniteSteps:
    """Counts steps without an update.

    Args:
        train: settings, of which `on_nonfinite`, `max_nonfinite_skips` and `precision` are used.
        topology: number of ranks.
        group: host process group of all ranks.
    """

    def __init__(self, train: TrainConfig, topology: Topology, group: dist.ProcessGroup) -> None:
        self.skips = 0
        self._train, self._topology, self._group = train, topology, group

    def describe(self, step: int, computed: Sequence[LossOutput], batches: Sequence[TrainingBatch]) -> str | None:
        """Describe the likely cause in one line; collective. None: an fp16 overflow, which the loss scaler handles.

        Args:
            step: number of the step, which left weights and optimizer unchanged.
            computed: losses of its micro-batches.
            batches: its micro-batches.
        """
        local = [_describe(all_terms(output), batch) for output, batch in zip(computed, batches, strict=True)]
        gathered: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(gathered, local, group=self._group)
        samples = enumerate(gathered)
        found = [(rank, *item) for rank, items in samples if rank % self._topology.tp_size == 0 for item in items]
        severity = max(worst for _, worst, _ in found)
        if self._train.precision == "fp16" and severity == 0:
            return None
        bad = [item for item in found if item[1] == severity]
        what = "; ".join(f"rank {rank}: {text}" for rank, _, text in bad[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more micro-batches" if len(bad) > MOST_NAMED else ""
        kind = "loss" if severity else "gradient norm"
        return f"step {step}: {kind} is not finite, the update was not applied; {what}{more}"

    def skip(self, message: str, checkpoint: Path | None) -> None:
        """Count a skipped step.

        Raises:
            NonFiniteError: `on_nonfinite` is `stop`, or `max_nonfinite_skips` is exceeded.
        """
        self.skips += 1
        allowed, last_good = self._train.max_nonfinite_skips, f"Last good checkpoint: {checkpoint or 'none yet'}"
        if self._train.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{message}: lower optimizer.lr, check the named samples, or set train.on_nonfinite=skip. {last_good}"
            )
        if self.skips > allowed:
            raise NonFiniteError(
                f"{message}. This is skip number {self.skips}, more than train.max_nonfinite_skips ({allowed}): "
                f"lower optimizer.lr, or check the named samples. {last_good}"
            )
        get_logger().warning("%s; skipped", message)


def _describe(terms: dict[str, Tensor], batch: TrainingBatch) -> tuple[int, str]:
    """Return the likelihood that this micro-batch is the cause (0 to 2), and its loss and keys as text.

    2: a term that depends on its own samples only is not finite. 1: only terms that depend on samples of other ranks
    too are not finite. 0: its loss is finite.
    """
    bad = [name for name, term in terms.items() if not math.isfinite(float(term))]
    own = [name for name in bad if name not in CROSS_RANK_TERMS]
    more = " ..." if len(batch) > MOST_NAMED else ""
    values = ", ".join(f"{name} {float(terms[name])}" for name in (own or bad or ["loss"]))
    return 2 if own else 1 if bad else 0, f"{values}, sample keys {', '.join(batch.keys[:MOST_NAMED])}{more}"
