"""Records the collectives that this process takes part in, with the bytes that they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

METHODS = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "all_gather": (
        *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single"),
        *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    ),
    "reduce_scatter": (
        *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
        *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    ),
    "all_to_all": ("alltoall", "alltoall_base", "all_to_all_single"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "barrier": ("barrier",),
}
"""Kinds of collectives -> methods of torch's process group, which every caller ends in, DeepSpeed too.

The names differ between versions of torch."""


class Collective(NamedTuple):
    """One call."""

    kind: str
    """Key of :data:`METHODS`."""
    num_bytes: int
    """Size of the larger side of a gather or scatter (of the whole), of the input of the other kinds."""
    dtype: torch.dtype | None
    """Data type of the first tensor; None without a tensor."""
    ranks: tuple[int, ...]
    """Ranks of the group, numbered as in the world."""


class Collectives(list[Collective]):
    """Calls in their order."""

    def of(self, kind: str, dtype: torch.dtype | None = None, ranks: tuple[int, ...] | None = None) -> Collectives:
        """Return the calls of a kind, only those with the given data type and group if these are not None."""
        return Collectives(
            call for call in self if call.kind == kind and dtype in (None, call.dtype) and ranks in (None, call.ranks)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all calls."""
        return sum(call.num_bytes for call in self)


@contextmanager
def recorded_collectives() -> Iterator[Collectives]:
    """Record the calls of this process until the context ends; groups of one rank are left out."""
    calls = Collectives()
    with ExitStack() as stack:
        for kind, names in METHODS.items():
            for name in filter(partial(hasattr, dist.ProcessGroup), names):
                recording = _recording(getattr(dist.ProcessGroup, name), kind, calls)
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, recording))
        yield calls


def _recording(method: Callable[..., Any], kind: str, calls: Collectives) -> Callable[..., Any]:
    def record(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
        if group.size() > 1:
            sides = [_tensors(argument) for argument in arguments if _tensors(argument)]
            sizes = [sum(tensor.nbytes for tensor in side) for side in sides]
            counted = sizes[1:] if kind == "all_to_all" else sizes
            dtype = sides[0][0].dtype if sides else None
            ranks = tuple(dist.get_process_group_ranks(group))
            calls.append(Collective(kind, max(counted, default=0), dtype, ranks))
        return method(group, *arguments, **options)

    return record


def _tensors(argument: Any) -> list[Tensor]:
    """Tensors of an argument: a tensor, or tensors in lists."""
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []
