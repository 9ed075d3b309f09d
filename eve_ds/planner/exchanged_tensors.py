"""Bytes of the tensors that ranks would exchange in one micro-batch, from a forward pass of a plain model."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from eve_ds.model.eve import EVE
from eve_ds.model.experts import Experts
from eve_ds.planner.parameters import Cutting
from eve_ds.planner.traffic import Passes


class ExchangedTensors:
    """Bytes of tensors that ranks would exchange in one micro-batch, by hooks on the layers of a plain model.

    Of layers that tensor parallelism cuts, those by rows sum their outputs in the forward pass, and those by columns
    the gradients of their inputs in the backward pass; split experts do both.
    """

    def __init__(self, model: EVE, cutting: Cutting) -> None:
        self._splits_experts = cutting.split_experts
        self._rows, self._calls = 0, 0
        self._forward = {True: 0, False: 0}
        """Bytes of sums in the forward pass: inside the blocks of the backbone, and outside."""
        self._backward = 0
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                module.register_forward_hook(self._experts)
            elif isinstance(module, nn.Linear | nn.Embedding):
                cut = cutting.find(f"{name}.weight")
                if cut is not None:
                    by_rows = isinstance(module, nn.Embedding) or cut.dim == 1
                    inside = name.startswith("backbone.blocks.")
                    module.register_forward_hook(partial(self._linear, by_rows=by_rows, inside=inside))

    def _experts(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls += 1
        self._rows += output.nbytes
        if self._splits_experts:
            self._forward[True] += output.nbytes
            self._backward += output.nbytes

    def _linear(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, by_rows: bool, inside: bool
    ) -> None:
        if by_rows:
            self._forward[inside] += output.nbytes
        else:
            self._backward += inputs[0].nbytes

    def passes(self, num_views: int, words: int) -> Passes:
        """Sums over the layers.

        Args:
            num_views: number of views that are balanced separately.
            words: bytes of the states of the masked words, whose gradient is summed too.
        """
        return Passes(
            self._rows, self._calls, num_views, self._forward[True], self._forward[False] + words, self._backward
        )
