"""Actions that can fail on some ranks only: if one rank fails, all ranks raise, so that none waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from safetensors import SafetensorError

from eve_ds.config import ConfigError
from eve_ds.distributed import broadcast_object, rank_zero

FAILURES = (ValueError, OSError, SafetensorError)
"""Errors of settings, files and data; another error is a bug, whose traceback its rank shows."""


def on_rank_zero(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; if it raises one of :data:`FAILURES`, every rank raises ConfigError. Collective."""
    problem = _problem_of(action) if rank_zero() else None
    problem = broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def on_every_rank(action: Callable[[], object], group: dist.ProcessGroup) -> None:
    """Run `action` on every rank; if it raises one of :data:`FAILURES` on any, every rank raises ConfigError.

    No rank returns before all ranks have finished. Collective over the ranks of `group`, the host process group.
    """
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, _problem_of(action), group=group)
    problems = [f"rank {rank}: {problem}" for rank, problem in enumerate(found) if problem is not None]
    if problems:
        raise ConfigError("; ".join(problems))


def _problem_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except FAILURES as error:
        return str(error)
    return None
