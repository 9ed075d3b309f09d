"""Rank, world size, process group, rank-0 log, seeds: the same under every launcher; torch only.

`torchrun` and `deepspeed` set torch's five variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT);
`srun` and `mpirun` set their own, which are mapped here; plain `python` is a world of one. Every function also works in
a world of one without a process group.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for the slowest rank before the run is given up."""

_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""(rank, world size, local rank, ranks of this host) as Open MPI, and MPICH and its relatives, name them."""


class LaunchError(ValueError):
    """The environment contradicts itself or lacks what is needed; the message names the variables and the way out."""


@dataclass(frozen=True)
class RankInfo:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this host: the index of its accelerator."""
    launcher: Literal["torch", "mpi", "slurm", "single"]
    """Whose variables were read; `torch` is torchrun and deepspeed."""


def read_environment(environ: MutableMapping[str, str] | None = None) -> RankInfo:
    """Find rank and world size in `environ` (default: `os.environ`) and export torch's five variables into it.

    The first of these that is present counts: torch's variables, those of an MPI launcher (one that runs inside a SLURM
    job knows better than the job how many processes it started), SLURM's. MASTER_ADDR and MASTER_PORT are kept where
    they are set.

    Raises:
        LaunchError: a variable that is missing or is no number, a rank outside of its world, or a world of one inside a
            SLURM job of several tasks: then each task would train on its own, unnoticed.
    """
    environ = os.environ if environ is None else environ
    info = _from_torch(environ) or _from_mpi(environ) or _from_slurm(environ) or RankInfo(0, 1, 0, "single")
    if not 0 <= info.rank < info.world_size:
        raise LaunchError(
            f"rank ({info.rank}) must be in 0 .. world size - 1 ({info.world_size - 1}); launcher variables"
        )
    tasks = _integer(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    if info.world_size == 1 and tasks > 1:
        raise LaunchError(
            f"SLURM_NTASKS ({tasks}) tasks were asked for, but this process is a world of one "
            f"({_source(environ, info)}), so each task would train alone: start it with srun and do not set RANK or "
            "WORLD_SIZE, or use `srun --ntasks=1` if one process is meant"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(info.rank), str(info.world_size)
    environ["LOCAL_RANK"] = str(info.local_rank)
    environ["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _master_address(environ, info)
    environ["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_master_port(environ))
    return info


def _from_torch(environ: Mapping[str, str]) -> RankInfo | None:
    if "RANK" not in environ:
        return None
    # An environment exported by hand may lack LOCAL_RANK; without SLURM it then has to mean one process per host.
    local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environ), None)
    local_rank = _integer(environ, local) if local else 0
    return RankInfo(_integer(environ, "RANK"), _integer(environ, "WORLD_SIZE"), local_rank, "torch")


def _from_mpi(environ: Mapping[str, str]) -> RankInfo | None:
    for rank, size, local_rank, _ in _MPI_VARIABLES:
        if rank in environ:
            # `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE but no local rank.
            local = local_rank if local_rank in environ or "SLURM_LOCALID" not in environ else "SLURM_LOCALID"
            return RankInfo(_integer(environ, rank), _integer(environ, size), _integer(environ, local), "mpi")
    return None


def _from_slurm(environ: Mapping[str, str]) -> RankInfo | None:
    # Only inside a step that srun started: a batch script itself carries SLURM_PROCID 0 and the job's SLURM_NTASKS.
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    rank, world_size = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_NTASKS")
    return RankInfo(rank, world_size, _integer(environ, "SLURM_LOCALID"), "slurm")


def _integer(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise LaunchError(f"{name} is not set, but the launcher's other variables are: set it, or unset the others")
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name} ('{environ[name]}') must be an integer") from None


def _source(environ: Mapping[str, str], info: RankInfo) -> str:
    if info.launcher == "torch":
        return f"RANK {environ['RANK']}, WORLD_SIZE {environ['WORLD_SIZE']}"
    return "no srun step around it" if info.launcher == "single" else f"by its {info.launcher} variables"


def _master_address(environ: Mapping[str, str], info: RankInfo) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if info.world_size == 1 or _all_on_this_host(environ, info):
        return "127.0.0.1"
    if nodes:
        return _first_host(nodes)
    raise LaunchError(
        f"MASTER_ADDR is not set and cannot be derived for a world of {info.world_size}: "
        "export it to all processes as the host of rank 0 (mpirun -genv MASTER_ADDR HOST, or -x MASTER_ADDR=HOST)"
    )


def _all_on_this_host(environ: Mapping[str, str], info: RankInfo) -> bool:
    local_size = next((environ[names[3]] for names in _MPI_VARIABLES if names[3] in environ), None)
    return info.launcher == "mpi" and local_size == str(info.world_size)


def _first_host(nodes: str) -> str:
    """First host of a SLURM node list: `gpu[03-05,09],cpu1` gives `gpu03`. Ranks start there in every distribution."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _master_port(environ: Mapping[str, str]) -> int:
    # Every rank must come to the same number, and two steps on a node to different ones. Below the ephemeral range.
    if "SLURM_JOB_ID" not in environ:
        return 29500
    step = int(environ["SLURM_STEP_ID"]) if environ.get("SLURM_STEP_ID", "").isdecimal() else 0
    return 15000 + (_integer(environ, "SLURM_JOB_ID") * 10 + step) % 15000


def initialize_process_group(backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> RankInfo:
    """Read the environment, join the run's process group and bind this process to its accelerator.

    Args:
        backend: `nccl`, `gloo` or another of torch's; None takes `nccl` where a CUDA device is usable, otherwise `gloo`
            (also where DS_ACCELERATOR asks for another device than cuda).
        timeout: longest wait in a collective, in this group and in every group made later, DeepSpeed's own included.

    Raises:
        LaunchError: see :func:`read_environment`; or this host has fewer CUDA devices than ranks.
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
