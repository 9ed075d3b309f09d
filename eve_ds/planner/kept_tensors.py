"""Bytes that autograd keeps of a forward pass, inside and outside of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from eve_ds.model.eve import Block


class KeptTensors:
    """Storages that autograd keeps in a forward pass, other than those of parameters, by the block that keeps them.

    A storage counts once, where it is kept first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._sizes: list[dict[int, int]] = [{}]
        """Address of a storage -> its bytes: outside of the blocks, then by block."""
        self._inputs: dict[int, int] = {}
        self._current = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what is kept until the context ends; the graph must live as long."""
        with saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def run_block(self, block: Block, *arguments: Any) -> Any:
        """Run a block and record what it keeps; a function for :meth:`eve_ds.model.eve.Backbone.checkpoint_blocks`."""
        self._inputs |= {
            argument.untyped_storage()._cdata: argument.untyped_storage().nbytes()
            for argument in arguments
            if isinstance(argument, Tensor)
        }
        self._sizes.append({})
        self._current = len(self._sizes) - 1
        try:
            return block(*arguments)
        finally:
            self._current = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters and not any(storage._cdata in sizes for sizes in self._sizes):
            self._sizes[self._current][storage._cdata] = storage.nbytes()
        return tensor

    @property
    def outside(self) -> int:
        """Bytes kept outside of the blocks."""
        return sum(self._sizes[0].values())

    @property
    def blocks(self) -> int:
        """Bytes kept by the blocks."""
        return sum(self._of_blocks)

    @property
    def largest_block(self) -> int:
        """Bytes kept by the block that keeps most."""
        return max(self._of_blocks, default=0)

    @property
    def block_inputs(self) -> int:
        """Bytes of the blocks' inputs that are not kept outside as well."""
        return sum(size for address, size in self._inputs.items() if address not in self._sizes[0])

    @property
    def _of_blocks(self) -> list[int]:
        return [sum(sizes.values()) for sizes in self._sizes[1:]]


def kept_by_losses(loss: Tensor) -> int:
    """Bytes of gradients that the loss of the masked words forms in the forward pass, in the graph below `loss`."""
    found, seen, waiting = 0, set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += sum(gradient.nbytes for gradient in getattr(node, "gradients", None) or ())
        waiting += [below for below, _ in node.next_functions]
    return found
