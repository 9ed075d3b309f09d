"""Process group, collectives, rank-0 log and seeds; depends on torch only.

Every function also works in a world of one without a process group. :mod:`eve_ds.launch_environment` reads rank and
world size from the launcher's variables.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from eve_ds.launch_environment import LaunchError, RankInfo, read_environment

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for the slowest rank before the run is given up."""


def initialize_process_group(backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> RankInfo:
    """Read the environment, join the run's process group and bind this process to its accelerator.

    Args:
        backend: `nccl`, `gloo` or another of torch's; None takes `nccl` where a CUDA device is usable, otherwise `gloo`
            (also where DS_ACCELERATOR asks for another device than cuda).
        timeout: longest wait in a collective, in this group and in every group made later, DeepSpeed's own included.

    Raises:
        LaunchError: see :func:`eve_ds.launch_environment.read_environment`; also raised when this host has fewer CUDA
            devices than ranks.
    """
    info = read_environment()
    if backend is None:
        cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
        backend = "nccl" if cuda else "gloo"
    if backend == "nccl":
        _bind_device(info)
    set_group_timeout(timeout)
    if info.world_size == 1:  # needs no port, so that two such runs can share a host
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    atexit.register(_leave_process_group)
    return info


def _leave_process_group() -> None:
    """End gloo's threads while the interpreter still stands.

    Processes that ended with the group alive were now and then aborted with all work done ("terminate called without
    an active exception"), too seldom to show that this is the whole cause. NCCL's
    groups are left to torch: ending them waits for what a failed peer will never finish.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _bind_device(info: RankInfo) -> None:
    devices = torch.cuda.device_count()
    if info.local_rank >= devices:
        raise LaunchError(
            f"local rank ({info.local_rank}) must be below the number of CUDA devices this process sees ({devices}): "
            "start fewer ranks per host, or show every rank all devices (SLURM: --gpus-per-node, not --gpus-per-task)"
        )
    torch.cuda.set_device(info.local_rank)


def set_group_timeout(timeout: timedelta) -> None:
    """Make `timeout` the default of every process group that is created from now on.

    DeepSpeed and its MoE layers create their groups with `torch.distributed.new_group(ranks)` and pass no timeout, and
    the one given for the world's group is not inherited: a peer that stops then stalls an all-to-all for torch's 30
    minutes. torch reads its defaults from these two module variables at every call.
    """
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:  # None where torch was built without NCCL
        distributed_c10d.default_pg_nccl_timeout = timeout


def rank_zero() -> bool:
    """Whether this process is the one that logs and writes: rank 0, or the only one."""
    return _rank() == 0


def place() -> tuple[int, int]:
    """Rank and world size of this process."""
    return (dist.get_rank(), dist.get_world_size()) if _in_group() else (0, 1)


def _rank() -> int:
    return dist.get_rank() if _in_group() else int(os.environ.get("RANK", "0"))


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum of `values` over the ranks of `group` (default: all), as a new tensor of the same shape, dtype and device."""
    total = values.detach().clone()
    if not _in_group():
        return total
    if dist.get_backend(group) == "nccl" and not total.is_cuda:
        total = total.cuda()
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def gather_objects(value: T) -> list[T]:
    """What every rank passed, in rank order, on every rank; travels by pickle."""
    if not _in_group():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows of all ranks, through which gradients flow back, and the number of this rank's first among them; collective.

    (N, D), N the same on all ranks -> (world size * N, D) in rank order. The gradient that a rank's rows get is the sum
    over ranks of those of their losses. With losses that are means over a rank's rows, and parameter gradients averaged
    over ranks as DeepSpeed does, that makes the gradient of the mean over all rows.
    """
    if not _in_group() or dist.get_world_size() == 1:
        return rows, 0
    return _GatherRows.apply(rows), dist.get_rank() * len(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = all_reduce_sum(gradient)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def broadcast_object(value: T, source: int = 0) -> T:
    """What rank `source` passed, on every rank; travels by pickle, the other ranks' `value` is ignored."""
    if not _in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's and torch's default generators (CPU and CUDA), differently for every (seed, rank).

    Plain `seed + rank` would give rank 1 of seed 0 the numbers of rank 0 of seed 1.
    """
    combined = (seed << 20) + rank
    random.seed(combined)
    # Not `torch.manual_seed`: where there is no CUDA it keeps a stack trace for later, 5 ms of every training step.
    torch.default_generator.manual_seed(combined)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(combined)


def get_logger() -> logging.Logger:
    """The package's logger: everything from rank 0, and warnings, marked with their rank, from the others."""
    logger = logging.getLogger("eve_ds")
    if not any(isinstance(handler, _RankHandler) for handler in logger.handlers):
        logger.addHandler(_RankHandler())
        logger.setLevel(logging.INFO)
    return logger


class _RankHandler(logging.Handler):
    """Writes to the standard error of the moment; the rank is looked up per record, as the group may start later."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        return bool((rank_zero() or record.levelno >= logging.WARNING) and super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if rank_zero() else f"[rank {_rank()}] {text}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # one write, so that ranks do not cut each other's lines
            sys.stderr.flush()
        except OSError:  # a full disk or a closed pipe must not end a training run
            self.handleError(record)
