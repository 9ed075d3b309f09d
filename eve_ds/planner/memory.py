"""Bytes of a rank by term: weights, optimizer states, gradients, buckets and activations.

A rank computes with D dense and E expert elements of b bytes each. ZeRO partitions dense parameters over the
`data_size` ranks, and experts over the `expert_replicas` ranks that hold the same experts. A share is therefore
D / data_size + E / expert_replicas elements. With N = D + E, or a share of it:

    ZeRO     0                 1          2                   3
    weights  b N               b N        b N                 b share
    masters  4 N, none in fp32 4 share    4 share             4 share
    moments  8 N               8 share    8 share             8 share

DeepSpeed pads each flat buffer by a few elements, which is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from eve_ds.planner.parameters import Held
from eve_ds.planner.shape import Shape


class Memory(NamedTuple):
    """Bytes of one rank; all but `host` are on its GPU."""

    weights: int
    """Weights in the precision of the forward pass."""
    masters: int
    """Weights in fp32 that the optimizer updates."""
    moments: int
    """Adam's two moments in fp32."""
    gradients: int
    """Most bytes of gradients that exist together: at the end of a backward pass."""
    buckets: int
    """Buffers of gradients on their way: the bucket, and its flat copy in the collective."""
    gathered: int
    """Weights that ZeRO 3 has gathered."""
    activations: int
    """Tensors that the forward pass keeps for the backward pass."""
    host: int = 0
    """Bytes in the memory of the host, with offload."""

    @property
    def gpu(self) -> int:
        """Sum of the terms on the GPU: an upper bound, since not all terms are at their largest together."""
        return sum(self) - self.host

    @property
    def persistent(self) -> int:
        """Weights and optimizer states on the GPU, which live as long as the run."""
        return self.weights + self.masters + self.moments


def memory(held: Held, shape: Shape, activations: int = 0) -> Memory:
    """Bytes of a rank.

    Args:
        held: elements that the rank computes with.
        shape: how the run is spread.
        activations: bytes that one micro-batch keeps, see :func:`eve_ds.planner.forward.forward_of`.
    """
    weights, gradients, buckets, gathered = _moved(held, shape)
    masters = 4 * _updated(held, shape) if shape.zero_stage or shape.element < 4 else 0
    moments = 8 * _updated(held, shape)
    if not shape.offload:
        return Memory(weights, masters, moments, gradients, buckets, gathered, activations)
    # The host holds the optimizer, gradients in fp32, and gradients and new weights in the precision of the GPU.
    host = masters + moments + (4 + 2 * shape.element) * _updated(held, shape)
    passing = 2 * shape.element * held.largest  # on the way between GPU and host
    return Memory(weights, 0, 0, 0, buckets + passing, gathered, activations, host)


def _updated(held: Held, shape: Shape) -> int:
    """Elements that this rank updates: all at ZeRO 0, else its share."""
    return held.all if shape.zero_stage == 0 else _share(held, shape)


def _share(held: Held, shape: Shape) -> int:
    return -(-held.dense // shape.data_size) - (-held.experts // shape.expert_replicas)


def _moved(held: Held, shape: Shape) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, buckets and gathered weights.

    ZeRO 0 has one gradient per weight. ZeRO 1 copies the gradients into flat buffers of the same size, so that both
    exist for a moment (:class:`eve_ds.parallel.zero.FlatGradients`). ZeRO 2 keeps the whole gradient of every tensor of
    which it updates a part. ZeRO 3 keeps its share of weights and gradients, and gathers the weights that it computes
    with; a parameter that one rank holds alone is not copied.
    """
    b, buckets = shape.element, _buckets(held, shape)
    if shape.zero_stage == 0:
        return b * held.all, b * held.all, 0, 0
    if shape.zero_stage == 1:
        return b * held.all, 2 * b * held.all, 0, 0
    if shape.zero_stage == 2:
        touched = most_touched(held.dense_sizes, shape.data_size)
        touched += most_touched(held.expert_sizes, shape.expert_replicas)
        return b * held.all, b * touched, buckets, 0
    share = b * _share(held, shape)
    partitioned = held.dense * (shape.data_size > 1) + held.experts * (shape.expert_replicas > 1)
    return share, share, buckets, b * min(shape.max_live_parameters, partitioned)


def _buckets(held: Held, shape: Shape) -> int:
    """Bytes of gradients on their way at ZeRO 2 and 3.

    They pass through a bucket, or through two in turns, and the collective takes a flat copy. The gradient of a tensor
    that is larger than a bucket passes by itself, with a copy of its own.
    """
    bucket = min(shape.reduce_bucket, held.all)
    double = shape.overlap_comm and shape.zero_stage == 2
    copied = 2 * held.largest if held.largest > bucket else bucket
    return shape.element * (bucket * (2 if double else 1) + copied)


def most_touched(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements of the tensors that lie wholly or partly in one of `ranks` equal parts of all tensors, at most."""
    part = -(-sum(sizes) // ranks) or 1
    touched, start = [0] * ranks, 0
    for size in sizes:
        for rank in range(start // part, -(-(start + size) // part)):
            touched[rank] += size
        start += size
    return max(touched)
