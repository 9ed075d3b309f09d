"""Rank and world size from the launcher's environment variables; standard library only.

`torchrun` and `deepspeed` set torch's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Other
launchers set their own, which :func:`read_environment` maps to torch's. A plain `python` process is a world of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import NamedTuple


class Launcher(NamedTuple):
    """Environment variables of one kind of launcher; of several names, the first that is set counts."""

    name: str
    rank: str
    """Variable that tells this launcher from the others."""
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    """Rank on the host; the last names are those of schedulers whose launcher also sets PMI variables."""
    local_size: tuple[str, ...] = ()


TORCH = Launcher("torch", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK", "SLURM_LOCALID"), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
SLURM = Launcher("slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",))
LAUNCHERS = (
    TORCH,
    *(
        Launcher(name, f"{prefix}_RANK", (f"{prefix}_SIZE",), (f"{prefix}_LOCAL_RANK",), (f"{prefix}_LOCAL_SIZE",))
        for name, prefix in (("openmpi", "OMPI_COMM_WORLD"), ("mvapich", "MV2_COMM_WORLD"), ("jsrun", "JSM_NAMESPACE"))
    ),
    Launcher("flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Launcher(
        "pals", "PALS_RANKID", ("PMI_SIZE", "PALS_SIZE"), ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"), ("PMI_LOCAL_SIZE",)
    ),
    Launcher(
        "pmi",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    SLURM,
)
"""Launchers in order of precedence: an MPI launcher inside a SLURM step knows better how many processes it started.

`pmi` are MPICH, Intel MPI, Cray MPI and `srun --mpi=pmi2`. jsrun and Flux may also set the variables of the others."""
_OWN_RANKS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables of torchrun and deepspeed, whose ranks need not be those of a launcher that started them on each host."""
_RANK_NAME = re.compile(r"(\w+?_)(?:TASK_)?(?:RANK|RANKID|PROCID|APP_PE)")
_HOST = re.compile(r"[\w.-]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%\w+)?\]?")
"""A host name, an IPv4 address, or an IPv6 address, which has two colons or more."""
_RANKS_WITHOUT_SIZE = ("PMIX_RANK", "ALPS_APP_PE")
_SIZE_NAMES = ("SIZE", "NRANKS", "NPROCS", "NTASKS", "NUM_TASKS", "WORLD_SIZE")


class LaunchError(ValueError):
    """The environment is contradictory or incomplete; the message names the variables and says what to do."""


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this host, which is also the index of this process's accelerator."""
    launcher: str
    """Name of a row of :data:`LAUNCHERS`, whose variables were read, or `single`; torchrun and deepspeed: `torch`."""
    local_size: int | None = None
    """Number of processes of this host, None if the launcher does not tell."""


def read_environment(environ: MutableMapping[str, str] | None = None) -> RankInfo:
    """Find rank and world size in `environ` (default: `os.environ`) and export torch's variables into it.

    MASTER_ADDR and MASTER_PORT are kept if they are set.

    Raises:
        LaunchError: a variable is missing or not a number, variables of two launchers contradict each other, the
            launcher is unknown, the rank is outside its world or its host, the ranks could never meet at MASTER_ADDR
            and MASTER_PORT, or a world of one runs where several tasks were started, each of which would silently
            train on its own.
    """
    environ = os.environ if environ is None else environ
    launcher = next((row for row in LAUNCHERS if _is_present(row, environ)), None)
    if launcher is None:
        _refuse_unknown_launchers(environ)
        info = RankInfo(0, 1, 0, "single")
    else:
        info = _read(launcher, environ)
    _refuse_contradictions(info, environ)
    environ["RANK"], environ["WORLD_SIZE"] = str(info.rank), str(info.world_size)
    environ["LOCAL_RANK"] = str(info.local_rank)
    if info.local_size is not None:
        environ["LOCAL_WORLD_SIZE"] = str(info.local_size)
    environ["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _master_address(environ, info)
    environ["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_master_port(environ))
    if info.world_size > 1:
        _check_master(environ)
    return info


def _is_present(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    # SLURM counts inside a step started by srun only: a batch script also has SLURM_PROCID 0 and the job's tasks.
    return launcher.rank in environ and (launcher is not SLURM or "SLURM_STEP_ID" in environ)


def _read(launcher: Launcher, environ: Mapping[str, str]) -> RankInfo:
    rank, size = _integer(environ, launcher.rank), _integer(environ, _first(launcher.size, environ))
    if not 0 <= rank < size:
        name = _first(launcher.size, environ)
        raise LaunchError(
            f"{launcher.rank} ({rank}) must be in 0 .. {name} - 1 ({size - 1}): unset both, or start with torchrun, "
            "srun or mpirun"
        )
    local = _first(launcher.local_rank, environ)
    # An environment exported by hand may lack LOCAL_RANK; outside SLURM this must mean one process per host.
    local_rank = 0 if launcher is TORCH and local not in environ else _integer(environ, local)
    counted = _first(launcher.local_size, environ) if launcher.local_size else ""
    local_size = _integer(environ, counted) if counted in environ else None
    if local_rank < 0 or (local_size is not None and local_rank >= local_size):
        most = "on" if local_size is None else f".. {counted} - 1 ({local_size - 1})"
        raise LaunchError(
            f"{local} ({local_rank}) must be in 0 {most}, the rank among the processes of this host: set it, or start "
            "with torchrun, srun or mpirun"
        )
    return RankInfo(rank, size, local_rank, launcher.name, local_size)


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str:
    """The first name that is set; the first of all if none is."""
    return next((name for name in names if name in environ), names[0])


def _integer(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise LaunchError(f"{name} is not set, but the launcher's other variables are: set it, or unset the others")
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name} ('{environ[name]}') must be an integer") from None


def _refuse_unknown_launchers(environ: Mapping[str, str]) -> None:
    """Refuse variables that only a launcher sets, if no launcher is known: each task would train alone.

    Raises:
        LaunchError: some but not all of torch's variables are set, or a variable is named as a rank of several tasks.
    """
    for name, alone in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        if environ.get(name, alone) != alone:
            raise LaunchError(f"{name} ({environ[name]}) is set, but RANK is not: set RANK too, or unset {name}")
    for name, value in environ.items():
        found = _RANK_NAME.fullmatch(name)
        if found is None or not value.isdecimal() or name == SLURM.rank:
            continue
        size = next((found[1] + end for end in _SIZE_NAMES if environ.get(found[1] + end, "").isdecimal()), None)
        if name in _RANKS_WITHOUT_SIZE or (size is not None and int(environ[size]) > 1):
            of = f" of {size} ({environ[size]})" if size else ""
            raise LaunchError(
                f"{name} ({value}){of} is the variable of a launcher that is not known, so each of its tasks would "
                "train alone: set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR in each task from its variables, or "
                "RANK=0 WORLD_SIZE=1 for a single task"
            )


def _refuse_contradictions(info: RankInfo, environ: Mapping[str, str]) -> None:
    """Refuse ranks that differ from those of the launcher that started this process.

    Raises:
        LaunchError: RANK and WORLD_SIZE are left over from elsewhere, or a job of several tasks runs one process.
    """
    tasks = _integer(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    if info.world_size == 1 and tasks > 1:
        raise LaunchError(
            f"SLURM_NTASKS ({tasks}) requests several tasks, but this process is a world of one "
            f"({_source(environ, info)}), so each task would train alone: start it with srun and do not set RANK or "
            "WORLD_SIZE, or use `srun --ntasks=1` if you want one process"
        )
    if info.launcher == "torch" and not any(name in environ for name in _OWN_RANKS):
        for launcher in LAUNCHERS[1:]:
            if _is_present(launcher, environ) and _first(launcher.size, environ) in environ:
                _compare(info, launcher, environ)


def _source(environ: Mapping[str, str], info: RankInfo) -> str:
    if info.launcher == "torch":
        return f"RANK {environ['RANK']}, WORLD_SIZE {environ['WORLD_SIZE']}"
    return "no srun step around it" if info.launcher == "single" else f"by its {info.launcher} variables"


def _compare(info: RankInfo, launcher: Launcher, environ: Mapping[str, str]) -> None:
    """Compare torch's variables with those of another launcher, whose tasks may each start several ranks."""
    theirs = _read(launcher, environ)
    smaller = info.world_size < theirs.world_size
    if smaller or (info.world_size == theirs.world_size and info.rank != theirs.rank):
        raise LaunchError(
            f"RANK ({info.rank}) of WORLD_SIZE ({info.world_size}) contradicts {launcher.rank} ({theirs.rank}) of "
            f"{_first(launcher.size, environ)} ({theirs.world_size}): unset RANK and WORLD_SIZE, which may be left "
            "over in this shell"
        )


def _master_address(environ: Mapping[str, str], info: RankInfo) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if info.world_size in (1, info.local_size):
        return "127.0.0.1"
    if nodes:
        return _first_host(nodes)
    raise LaunchError(
        f"MASTER_ADDR is not set and cannot be derived for a world of {info.world_size}: "
        "export it to all processes as the host of rank 0 (mpirun -genv MASTER_ADDR HOST, or -x MASTER_ADDR=HOST)"
    )


def _check_master(environ: Mapping[str, str]) -> None:
    """Refuse an address at which ranks could only wait for each other until the time limit.

    Raises:
        LaunchError: MASTER_ADDR is neither a host name nor an IP address, or MASTER_PORT is no port.
    """
    port, address = _integer(environ, "MASTER_PORT"), environ["MASTER_ADDR"]
    if not 1 <= port <= 65535:  # with port 0 every rank would choose another one
        raise LaunchError(f"MASTER_PORT ({port}) must be a port from 1 to 65535, the same for all ranks")
    if not _HOST.fullmatch(address):
        raise LaunchError(
            f"MASTER_ADDR ('{address}') must be the name or IP address of the host of rank 0, and nothing else: the "
            "port is MASTER_PORT"
        )


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
