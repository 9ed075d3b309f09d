"""How tensor parallelism cuts each kind of parameter: one table by plain name, and the place of a shard in its tensor.

Layers, checkpoints and the gradient norm read this table through the :class:`Shard` that a cut parameter carries. A
parameter without one is whole: every tensor-parallel rank holds it, with equal values.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cut(NamedTuple):
    """How a kind of tensor is cut into shards."""

    dim: int
    """Dimension of the plain tensor along which it is cut."""
    blocks: int = 1
    """Number of equal blocks along that dimension, each of which is cut, such as queries, keys and values."""


TABLE = {
    r"\.qkv\.weight": Cut(0, 3),
    r"\.[qv]_bias": Cut(0),
    r"\.query\.(weight|bias)": Cut(0),
    r"\.key_value\.(weight|bias)": Cut(0, 2),
    r"\.attention\.proj\.weight": Cut(1),
    r"\.fc1\.(weight|bias)": Cut(0),
    r"\.fc2\.weight": Cut(1),
    r"\.text_embedding\.word\.weight": Cut(0),
    r"(^|\.)text_head\.bias": Cut(0),
}
"""Regular expression for the end of a plain name -> cut. Biases that are added after a sum over ranks, norms, the
router and all other parameters are whole."""


def cut_of(name: str) -> Cut | None:
    """Cut of the tensor with a plain name; None if it is always whole."""
    return next((cut for pattern, cut in TABLE.items() if re.search(f"{pattern}$", name)), None)


class Runs(NamedTuple):
    """Elements of a flat tensor: `number` runs of `run` elements each, `stride` elements apart."""

    offset: int
    """First element of the first run."""
    run: int
    stride: int
    number: int

    @classmethod
    def whole(cls, numel: int) -> Runs:
        """All elements of a tensor."""
        return cls(0, numel, numel, 1)

    @property
    def numel(self) -> int:
        """Number of elements of all runs."""
        return self.run * self.number

    @property
    def end(self) -> int:
        """Element behind the last one."""
        return self.offset + (self.number - 1) * self.stride + self.run

    def view(self, flat: Tensor) -> Tensor:
        """View (number, run) of the elements in a flat, contiguous tensor."""
        return flat.as_strided((self.number, self.run), (self.stride, 1), flat.storage_offset() + self.offset)

    def parts(self, start: int, stop: int) -> list[tuple[Runs, int]]:
        """Elements `start` to `stop` of the runs, as at most three pieces, each with its first element among these.

        The pieces are the rest of a run, whole runs, and the begin of a run.
        """
        pieces, reached = [], start
        while reached < stop:
            first, inside = divmod(reached, self.run)
            number = 1 if inside else max((stop - reached) // self.run, 1)
            run = min(self.run - inside, stop - reached) if number == 1 else self.run
            pieces.append((Runs(self.offset + first * self.stride + inside, run, self.stride, number), reached - start))
            reached += run * number
        return pieces


class Shard(NamedTuple):
    """Part of a tensor that one tensor-parallel rank holds."""

    shape: torch.Size
    """Shape of the plain tensor; of one expert's, if the parameter stacks several."""
    cut: Cut
    rank: int
    """Tensor-parallel rank."""
    size: int
    """Number of tensor-parallel ranks. If it does not divide the vocabulary, the last shards end in padding."""

    @property
    def length(self) -> int:
        """Length of the shard's blocks along the dimension that is cut."""
        return math.ceil(self.shape[self.cut.dim] / (self.cut.blocks * self.size))

    @property
    def local_shape(self) -> torch.Size:
        """Shape of the shard, padding included."""
        local = [*self.shape]
        local[self.cut.dim] = self.length * self.cut.blocks
        return torch.Size(local)

    @property
    def runs(self) -> Runs:
        """Elements of the plain tensor that the shard holds, in the shard's own order, without padding."""
        whole, (dim, blocks) = self.shape[self.cut.dim], self.cut
        inner = math.prod(self.shape[dim + 1 :])
        number = math.prod(self.shape[:dim]) * blocks
        first = min(self.rank * self.length, whole)
        run = min(self.length, whole // blocks - first) * inner
        return Runs(first * inner, run, whole // blocks * inner, number)

    def take(self, whole: Tensor) -> Tensor:
        """Copy this part out of the plain tensor, or out of a stack of them, of equal shape; padding is 0."""
        stacked = whole.dim() - len(self.shape)
        tensors = whole.reshape(-1, math.prod(self.shape)) if stacked else whole.reshape(1, -1)
        local = self.local_shape
        shards = [self.runs.view(flat.contiguous()).flatten() for flat in tensors]
        padded = [F.pad(shard, (0, math.prod(local) - shard.numel())).view(local) for shard in shards]
        return torch.stack(padded) if stacked else padded[0].clone()


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """Shard that a parameter holds; None if it holds whole tensors."""
    return getattr(parameter, "shard", None)


def mark(parameter: nn.Parameter, shard: Shard) -> None:
    """Note on a parameter which shard it holds, and let DeepSpeed's norms of gradients count every rank's part."""
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = parameter.model_parallel = True  # type: ignore[attr-defined]
