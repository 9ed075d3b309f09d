"""Join and leave the run's process group, and check the addresses and devices that it needs; depends on torch only.

:mod:`eve_ds.launch_environment` reads rank and world size from the launcher's variables.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from eve_ds.launch_environment import LaunchError, RankInfo, read_environment
from eve_ds.log import get_logger
from eve_ds.lost_ranks import rank_loss

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""Longest wait of a collective for the slowest rank; after that the run fails."""


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
        if rank_loss(error) is not None:
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
