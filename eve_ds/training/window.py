"""Metrics of the steps since the last metrics record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from eve_ds.distributed import all_reduce_sum
from eve_ds.model.moe import RouterStatistics, on_host, router_metrics, sum_statistics
from eve_ds.model.with_losses import LossOutput
from eve_ds.topology import Topology


class Window:
    """Collects loss terms, counts and router statistics; tensors stay on the device until they are read.

    Args:
        started: training time at the start of the window, in seconds.
    """

    def __init__(self, started: float = 0.0) -> None:
        self.started = started
        self.steps = 0
        self.clock_seconds = 0.0
        """Time of the steps by the clock, which also counts waiting."""
        self.totals: defaultdict[str, float] = defaultdict(float)
        """Counts summed over the steps of the window and over all ranks."""
        self._terms: list[dict[str, Tensor]] = []
        self._moe: dict[str, tuple[RouterStatistics, ...]] = {}

    def add_step(self, computed: list[LossOutput], totals: Mapping[str, float]) -> None:
        """Add one update, with the losses of its micro-batches and its counts over all ranks."""
        self.steps += 1
        for name, total in totals.items():
            self.totals[name] += total
        self._terms += [all_terms(output) for output in computed]
        last = computed[-1].moe
        self._moe = {view: tuple(layer.statistics for layer in layers) for view, layers in last.items()}

    def reduce(self, topology: Topology) -> dict[str, float]:
        """Return means of loss terms over micro-batches and ranks, and router statistics of the last micro-batch.

        Router statistics cover all views together. With several views, each view also has its own statistics, without
        the routes to each expert. Collective.
        """
        names = sorted(self._terms[0])
        values = torch.stack([torch.stack([terms[name] for name in names]) for terms in self._terms]).mean(dim=0)
        numbers = dict(zip(names, (all_reduce_sum(values) / topology.world_size).tolist(), strict=True))
        counted = iter(on_host([own for layers in self._moe.values() for own in layers]))
        by_view = {view: [next(counted) for _ in layers] for view, layers in self._moe.items()}
        for layer, of_views in enumerate(zip(*by_view.values(), strict=True)):
            numbers |= {f"moe{layer}/{name}": value for name, value in router_metrics(sum_statistics(of_views)).items()}
            for view, own in zip(self._moe, of_views, strict=True) if len(of_views) > 1 else ():
                figures = {name: value for name, value in router_metrics(own).items() if "routes/" not in name}
                numbers |= {f"moe{layer}/{view}/{name}": value for name, value in figures.items()}
        return numbers


def all_terms(output: LossOutput) -> dict[str, Tensor]:
    """Return `loss` and its terms by name, detached."""
    return {name: term.detach() for name, term in {"loss": output.loss, **output.terms}.items()}
