"""What pre-training and fine-tuning share: the output folder and its lock, learning rate, signals, numbers that are not
finite."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.config import Config, ConfigError, parse_written_config
from eve_ds.distributed import broadcast_object, get_logger, rank_zero

IDENTITY = ("model", "masking", "data", "loss", "task")
"""Sections that may not change within one output folder, and neither may `train.seed`."""
NO_IDENTITY = {"data": {"num_workers", "max_bad_share"}}
"""Keys of them that may."""
MOST_NAMED = 8
"""Sample keys of a micro-batch, and micro-batches, that a message names."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Ask a run to save and end: what `scancel`, pre-emption and `sbatch --signal` send."""


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; names step, rank and sample keys. Nothing was updated."""


class StopSignals:
    """Notes that a signal has asked to stop, while it is entered; what the signals did before comes back after."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        """The step under way is finished, and one more may follow before all ranks know."""
        self.requested = True
        get_logger().warning("%s: saving at the end of the step, then stopping", signal.Signals(number).name)


class FolderLock:
    """At most one run writes into a folder; the lock ends with the process that holds it, however that ends.

    A lock of the process, not of the open file: worker processes, which outlive a killed rank by seconds, must not
    keep it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take it; raises ConfigError where another process has it."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"train.output_dir ({self.path.parent}) is being written by another run ({owner}): wait for its end, "
                "or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def check_output_dir(config: Config, resume: Literal["auto", "none"] | Path) -> None:
    """Create the output folder, or check that it can be written and belongs to this run.

    Raises:
        ConfigError: the folder cannot be written, holds another run, or holds a run although `resume` is `none`.
    """
    folder = config.train.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permission bits say little about root, quotas, read-only mounts
    except OSError as error:
        raise ConfigError(
            f"train.output_dir ({folder}) cannot be written: {error.strerror}; name another folder or change its "
            "permissions"
        ) from None
    written = folder / "config.json"
    if not written.is_file():
        return
    if resume == "none":
        raise ConfigError(f"train.output_dir ({folder}) holds a run: use --resume auto, or name another folder")
    try:
        before = json.loads(written.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{written} is not JSON ({error}): restore it from a checkpoint of the run") from None
    before = parse_written_config(before, str(written)).model_dump(
        mode="json"
    )  # with fields that are newer than the run
    difference = _difference(_identity(before), _identity(config.model_dump(mode="json")))
    if difference is not None:
        key, then, now = difference
        raise ConfigError(
            f"train.output_dir ({folder}) is the folder of another run: its {key} is {then!r}, this run's is {now!r}; "
            "name another folder"
        )


def _identity(tree: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run, by dotted key."""
    identity = {"train.seed": tree.get("train", {}).get("seed")}
    for section in IDENTITY:
        identity |= {
            f"{section}.{key}": value
            for key, value in (tree.get(section) or {}).items()
            if key not in NO_IDENTITY.get(section, ())
        }
    return identity


def _difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """First key that differs, and both values."""
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def on_rank_zero(action: Callable[[], None]) -> None:
    """Run it on rank 0; what it finds wrong with the configuration or the disk is raised on every rank."""
    problem: str | None = None
    if rank_zero():
        try:
            action()
        except (ConfigError, OSError) as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def learning_rate(config: Config, step: int, seconds: float) -> float:
    """Learning rate of the update after `step` updates and `seconds` of training.

    Linear warm-up over `warmup_steps`, times a decay from 1 to `final_lr_share` over the rest of the steps, or over
    the whole time budget with `decay_by: seconds`.
    """
    settings, train = config.optimizer, config.train
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay_by == "seconds" and train.max_seconds is not None:
        progress = seconds / train.max_seconds
    else:
        progress = (step - settings.warmup_steps) / max(train.max_steps - settings.warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    shape = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    decay = settings.final_lr_share + (1 - settings.final_lr_share) * shape[settings.decay]
    return settings.lr * warmup * decay


def poison_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, with gradients that are not finite if it is not finite.

    So the one check before the update finds both, and the host need not wait for the loss. A loss can be infinite while
    its gradient is not, as a square can overflow where its derivative does not.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that refuses an update with a non-finite gradient on any rank, as ZeRO's optimisers do.

    DeepSpeed at ZeRO 0 in fp32 would apply it. `overflow` is the attribute its engine looks for.
    """

    overflow = False

    def step(self, closure: Any = None) -> Any:
        """Update unless a gradient of any rank is not finite; then change nothing and set `overflow`."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self.overflow = not bool(finite)
        return None if self.overflow else super().step(closure)
