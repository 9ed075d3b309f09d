"""Errors of torch about another rank, in words that name the wait; depends on torch only."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_TIMED_OUT = re.compile(r"(?:[Tt]imed out|timeout) (?:after|waiting) (\d+) ?(ms|seconds)")
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "pair closure", "got 0 bytes")
_WRAPPERS = ("distributed.py", "process_group.py", "lost_ranks.py")


class RankLostError(RuntimeError):
    """Another rank has ended, or did not answer in time."""


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
        problem = rank_loss(error, setting)
        if problem is None:
            raise
        raise RankLostError(problem) from None


def rank_loss(error: RuntimeError, setting: str | None = None) -> str | None:
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
    """Innermost function of the package that an error passed, outside of the modules that wrap torch's collectives."""
    inside = f"{__package__}{os.sep}"
    places = [
        (frame.filename.rpartition(inside)[2], frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if inside in frame.filename
    ]
    places = [place for place in places if place[0] not in _WRAPPERS] or places
    return ", ".join(places[-1]) if places else "torch"
