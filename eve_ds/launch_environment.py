"""Rank and world size from the launcher's environment variables; standard library only.

`torchrun` and `deepspeed` set torch's five variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
`srun` and `mpirun` set their own variables, which :func:`read_environment` maps to torch's five. A plain `python`
process is a world of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""(rank, world size, local rank, ranks on this host) as named by Open MPI, and by MPICH and its derivatives."""


class LaunchError(ValueError):
    """The environment is contradictory or incomplete; the message names the variables and says what to do."""


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this host, which is also the index of this process's accelerator."""
    launcher: Literal["torch", "mpi", "slurm", "single"]
    """Launcher whose variables were read; `torch` covers torchrun and deepspeed."""


def read_environment(environ: MutableMapping[str, str] | None = None) -> RankInfo:
    """Find rank and world size in `environ` (default: `os.environ`) and export torch's five variables into it.

    The first of these sources that is present counts: torch's variables, the variables of an MPI launcher, SLURM's
    variables. MPI precedes SLURM because an MPI launcher inside a SLURM job knows better than the job how many
    processes it started. MASTER_ADDR and MASTER_PORT are kept if they are set.

    Raises:
        LaunchError: a variable is missing or not a number, the rank is outside its world, or a world of one runs inside
            a SLURM job of several tasks, where each task would silently train on its own.
    """
    environ = os.environ if environ is None else environ
    info = _from_torch(environ) or _from_mpi(environ) or _from_slurm(environ) or RankInfo(0, 1, 0, "single")
    if not 0 <= info.rank < info.world_size:
        rank, size = _names(environ, info)
        raise LaunchError(
            f"{rank} ({info.rank}) must be in 0 .. {size} - 1 ({info.world_size - 1}): unset both, or start with "
            "torchrun, srun or mpirun"
        )
    tasks = _integer(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    if info.world_size == 1 and tasks > 1:
        raise LaunchError(
            f"SLURM_NTASKS ({tasks}) requests several tasks, but this process is a world of one "
            f"({_source(environ, info)}), so each task would train alone: start it with srun and do not set RANK or "
            "WORLD_SIZE, or use `srun --ntasks=1` if you want one process"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(info.rank), str(info.world_size)
    environ["LOCAL_RANK"] = str(info.local_rank)
    environ["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _master_address(environ, info)
    environ["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_master_port(environ))
    return info


def _from_torch(environ: Mapping[str, str]) -> RankInfo | None:
    if "RANK" not in environ:
        return None
    # An environment exported by hand may lack LOCAL_RANK; outside SLURM this must mean one process per host.
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
    # Only inside a step started by srun: a batch script itself also has SLURM_PROCID 0 and the job's SLURM_NTASKS.
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


def _names(environ: Mapping[str, str], info: RankInfo) -> tuple[str, str]:
    """Return the names of the variables that hold rank and world size, for more than one process."""
    if info.launcher == "mpi":
        return next((rank, size) for rank, size, *_ in _MPI_VARIABLES if rank in environ)
    return ("SLURM_PROCID", "SLURM_NTASKS") if info.launcher == "slurm" else ("RANK", "WORLD_SIZE")


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
    """First host of a SLURM node list: `gpu[03-05,09],cpu1` gives `gpu03`. Every distribution puts rank 0 there."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _master_port(environ: Mapping[str, str]) -> int:
    # Every rank must derive the same port, and two steps on a node different ones. Stays below the ephemeral range.
    if "SLURM_JOB_ID" not in environ:
        return 29500
    step = int(environ["SLURM_STEP_ID"]) if environ.get("SLURM_STEP_ID", "").isdecimal() else 0
    return 15000 + (_integer(environ, "SLURM_JOB_ID") * 10 + step) % 15000
