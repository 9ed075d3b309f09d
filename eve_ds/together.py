"""Actions that can fail on some ranks only: if one rank fails, all ranks raise, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from eve_ds.config import ConfigError
from eve_ds.distributed import broadcast_object, gather_objects, rank_zero
from eve_ds.storage import SaveError, is_disk_error, reason, unusable

T = TypeVar("T")

FAILURES = (ValueError, OSError, SafetensorError)
"""Errors of settings, files and data; another error is a bug, whose traceback its rank shows."""


class _Problem(NamedTuple):
    """What the other ranks learn of an error."""

    text: str
    of_disk: bool
    """Whether the disk failed, rather than a setting or a file being wrong."""

    @classmethod
    def of(cls, error: Exception | None) -> _Problem | None:
        """Problem of an error; None without one."""
        if error is None:
            return None
        if is_disk_error(error):
            return cls(reason(error), True)
        return cls(unusable(error) if isinstance(error, OSError) else str(error), False)


def on_rank_zero(action: Callable[[], object]) -> None:
    """Run `action` on rank 0; if it raises one of :data:`FAILURES`, every rank raises. Collective.

    Raises:
        SaveError: the disk is full, read-only or broken.
        ConfigError: any other failure.
    """
    error = _failure_of(action) if rank_zero() else None
    _raise(broadcast_object(_Problem.of(error)), error)


def from_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return the result of `action` on rank 0, on every rank; without a process group, that of this process.

    Collective over the ranks of `group`, by default all.

    Raises:
        SaveError, ConfigError: see :func:`on_rank_zero`.
    """
    found: list[T] = []
    error = _failure_of(lambda: found.append(action())) if rank_zero() or not dist.is_initialized() else None
    problem, found = broadcast_object((_Problem.of(error), found), group=group)
    _raise(problem, error)
    return found[0]


def on_every_rank(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `action` on every rank; if it raises one of :data:`FAILURES` on any, every rank raises.

    No rank returns before all ranks have finished. Collective over the ranks of `group`, by default all.

    Raises:
        SaveError: some rank's disk is full, read-only or broken.
        ConfigError: any other failure.
    """
    error = _failure_of(action)
    found = gather_objects(_Problem.of(error), group)
    problems = [f"rank {rank}: {problem.text}" for rank, problem in enumerate(found) if problem is not None]
    if problems:
        of_disk = any(problem is not None and problem.of_disk for problem in found)
        raise (SaveError if of_disk else ConfigError)("; ".join(problems)) from error


def _raise(problem: _Problem | None, error: Exception | None) -> None:
    if problem is not None:
        raise (SaveError if problem.of_disk else ConfigError)(problem.text) from error


def _failure_of(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except FAILURES as error:
        return error
    return None
