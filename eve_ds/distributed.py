"""Process group, collectives, rank-0 log and seeds; depends on torch only.

Every function also works in a world of one without a process group. :mod:`eve_ds.launch_environment` reads rank and
world size from the launcher's variables.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from eve_ds.launch_environment import LaunchError, RankInfo, read_environment
from eve_ds.printable import printable

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""Longest wait of a collective for the slowest rank; after that the run fails."""
_TIMED_OUT = re.compile(r"(?:[Tt]imed out|timeout) (?:after|waiting) (\d+) ?(ms|seconds)")
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "pair closure", "got 0 bytes")


class RankLostError(RuntimeError):
    """Another rank has ended, or did not answer in time."""


def initialize_process_group(backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> RankInfo:
    """Read the environment, join the run's process group and bind this process to its accelerator.

    Args:
        backend: `nccl`, `gloo` or another backend of torch. None selects `nccl` if a CUDA device is usable and
            DS_ACCELERATOR does not name another device, otherwise `gloo`.
        timeout: longest wait in a collective, in this group and in every later group, including DeepSpeed's own.

    Raises:
        LaunchError: see :func:`eve_ds.launch_environment.read_environment`; also raised when this host has fewer CUDA
            devices than ranks, lacks an interface of GLOO_SOCKET_IFNAME, or cannot use MASTER_ADDR and MASTER_PORT.
    """
    info = read_environment()
    if backend is None:
        cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
        backend = "nccl" if cuda else "gloo"
    if backend == "nccl":
        _bind_device(info)
    set_group_timeout(timeout)
    if backend == "gloo":
        _check_interface_names()
    if info.world_size == 1:  # this store needs no port, so two such runs can share a host
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _check_interface(info)
        _join(backend, timeout)
    atexit.register(leave_process_group)
    return info


def check_accelerator() -> None:
    """Raise LaunchError if DS_ACCELERATOR names no device of this machine; call before the import of DeepSpeed."""
    name = os.environ.get("DS_ACCELERATOR", "cpu")
    if name not in ("cpu", "cuda"):
        raise LaunchError(f"DS_ACCELERATOR ('{name}') must be cpu or cuda: set one of them, or unset it")
    if name == "cuda" and not torch.cuda.is_available():
        raise LaunchError("DS_ACCELERATOR (cuda) needs a CUDA device, and this process sees none: set cpu, or unset it")


def _join(backend: str, timeout: timedelta) -> None:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address.strip("[]"), None)
    except OSError as error:  # a name that is not known yet may become so while the hosts of a cluster start
        get_logger().warning("MASTER_ADDR (%s) has no address on this host (%s): waiting", address, error.strerror)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        text = str(error)
        if "EADDRINUSE" in text:
            raise LaunchError(
                f"MASTER_PORT ({port}) is in use on this host, perhaps by another run: choose another one for all "
                "ranks (deepspeed and torchrun: --master_port)"
            ) from None
        if _TIMED_OUT.search(text) or any(sign in text for sign in _CLOSED):  # about another rank
            raise
        reason = text.partition("\n")[0]
        raise LaunchError(
            f"MASTER_ADDR ({address}) cannot be reached at MASTER_PORT ({port}) ({reason}): name the "
            "host of rank 0, and a port that no other program uses"
        ) from None


def _check_interface_names() -> None:
    """Raise LaunchError if this host lacks a network interface that GLOO_SOCKET_IFNAME names."""
    present = sorted(name for _, name in socket.if_nameindex())
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name.partition(":")[0] not in present:  # eth0:1 is an alias of eth0
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME ({name}) is no network interface of this host: name one of {', '.join(present)}, "
                "or unset it"
            )


def leave_process_group(limit: float = 5.0) -> None:
    """End gloo's work before the interpreter shuts down; runs at the exit of a process that joined a group.

    A worker thread of gloo drops the tensors of a collective a moment after it has reported the result. It needs the
    lock of the interpreter for that, and a process that shuts down meanwhile aborts ("terminate called without an
    active exception"; pytorch/pytorch, pull request 179291). Ending a group joins its threads only if nobody else
    holds the group, and DeepSpeed's modules do, so this function also waits until the threads sleep. NCCL groups are
    left to torch, because ending them waits for operations that a failed peer will never finish.

    Args:
        limit: longest wait, in seconds.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    deadline, asleep = time.monotonic() + limit, 0
    while asleep < 2 and time.monotonic() < deadline:  # one look could meet a thread that waits for this one's lock
        time.sleep(0.001)
        asleep = asleep + 1 if set(_gloo_thread_states()) <= {"S"} else 0


def _gloo_thread_states() -> Iterator[str]:
    """State of every worker thread of gloo as Linux names it, such as S (sleeping) or R (running); none elsewhere."""
    for status in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
            if name == "pt_gloo_runloop":
                yield rest.split()[0]


def _check_interface(info: RankInfo) -> None:
    """Refuse a host that gloo would announce to other hosts under an address of the host itself.

    gloo listens on the address of the host's name. Debian's /etc/hosts gives that name the address 127.0.1.1.

    Raises:
        LaunchError: the ranks are on several hosts, and the name has a loopback address or none.
    """
    several_hosts = info.local_size is not None and info.local_size < info.world_size
    if "GLOO_SOCKET_IFNAME" in os.environ or not several_hosts or _is_loopback(os.environ["MASTER_ADDR"]):
        return
    name = socket.gethostname()
    if _is_loopback(name):
        raise LaunchError(
            f"GLOO_SOCKET_IFNAME is not set, and the name of this host ({name}) has no address that other hosts reach: "
            "set it on every host to the network interface between them (`ip -brief address` lists them)"
        )


def _is_loopback(host: str) -> bool:
    """Whether a host name or address means this host only; so does a name without an address, for gloo."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


@contextmanager
def rank_losses(setting: str | None = None) -> Iterator[None]:
    """Context in which the error of torch about another rank becomes RankLostError, with the place of the wait.

    Args:
        setting: name of the setting for the longest wait, if there is one.

    Raises:
        RankLostError: a rank has ended, is stopped, is stuck or is much slower than this one.
    """
    try:
        yield
    except RuntimeError as error:
        problem = _rank_loss(error, setting)
        if problem is None:
            raise
        raise RankLostError(problem) from None


def _rank_loss(error: RuntimeError, setting: str | None) -> str | None:
    """Message about another rank, or None if the error is about something else."""
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text):
        return None
    if timed_out := _TIMED_OUT.search(text):
        seconds = int(timed_out[1]) / (1000 if timed_out[2] == "ms" else 1)
        return (
            f"another rank did not answer within {seconds:.0f} s ({f'{setting}; ' if setting else ''}waited in "
            f"{_place(error)}): it is stopped, stuck, far slower, or was never started"
        )
    if any(sign in text for sign in _CLOSED):
        return f"another rank has ended (noticed in {_place(error)}): its own log or its launcher's has the cause"
    return None


def _place(error: BaseException) -> str:
    """Innermost function of the package, outside of this module, that an error passed."""
    inside = f"{__package__}{os.sep}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if inside in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__] or frames
    return f"{frames[-1].filename.rpartition(inside)[2]}, {frames[-1].name}" if frames else "torch"


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
    such groups do not inherit the timeout of the world's group. A peer that stops would then stall an all-to-all for
    torch's 30 minutes. torch reads its defaults from these two module variables at every call.
    """
    distributed_c10d.default_pg_timeout = timeout
    if distributed_c10d.default_pg_nccl_timeout is not None:  # None if torch was built without NCCL
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


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Values of the ranks of `group` (default: all) in rank order, on each of them; transferred by pickle."""
    if not _in_group():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Gather the rows of all ranks with gradients, and the index of this rank's first row among them; collective.

    (N, D), with the same N on all ranks -> (world size * N, D) in rank order. The backward gives each rank's rows the
    sum over ranks of the gradients of their losses. If each loss is a mean over its rank's rows, and parameter
    gradients are averaged over ranks as DeepSpeed does, the result is the gradient of the mean over all rows.
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


def broadcast_object(value: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Value of rank `source`, on every rank of `group` (default: all); transferred by pickle.

    The `value` of other ranks is ignored.
    """
    if not _in_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's and torch's default generators (CPU and CUDA), differently for every (seed, rank).

    Plain `seed + rank` would give rank 1 of seed 0 the numbers of rank 0 of seed 1. Seeds count modulo 2**43, since
    torch takes 64 bits.
    """
    combined = ((seed % 2**43) << 20) + rank
    random.seed(combined)
    # Not `torch.manual_seed`: without CUDA it stores a stack trace for later use, which costs 5 ms per training step.
    torch.default_generator.manual_seed(combined)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(combined)


def get_logger() -> logging.Logger:
    """Package logger: shows all records of rank 0, and warnings of the other ranks, marked with their rank."""
    logger = logging.getLogger("eve_ds")
    if not any(isinstance(handler, _RankHandler) for handler in logger.handlers):
        logger.addHandler(_RankHandler())
    if logger.level == logging.NOTSET:  # others may have reset it since the first call
        logger.setLevel(logging.INFO)
    return logger


class _OneLineFormatter(logging.Formatter):
    """Formatter that keeps a message on one line, whatever it quotes; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _RankHandler(logging.Handler):
    """Handler that writes to the current standard error; looks up the rank per record, as the group may start later."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        return bool((rank_zero() or record.levelno >= logging.WARNING) and super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if rank_zero() else f"[rank {_rank()}] {text}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # a single write keeps lines of different ranks apart
            sys.stderr.flush()
        except OSError:  # a full disk or a closed pipe must not end a training run
            self.handleError(record)
