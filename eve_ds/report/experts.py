"""Use of experts by modality: router statistics of an evaluation pass, and their figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from eve_ds.data.batch import Batch
from eve_ds.model.moe import RouterStatistics, router_metrics, sum_statistics
from eve_ds.report.style import FAINT, IMAGE_COLOR, INK, TEXT_COLOR, save, tidy
from eve_ds.views import IMAGE, TEXT


@torch.no_grad()
def expert_use(model: nn.Module, batches: Iterable[Batch]) -> tuple[RouterStatistics, ...]:
    """Return the router statistics of each MoE layer, from shallow to deep, summed over views and batches.

    Args:
        model: an EVE in evaluation mode.
        batches: at least one batch.

    Raises:
        ValueError: `batches` is empty.
    """
    total: list[RouterStatistics] | None = None
    for batch in batches:
        views = model(**batch.model_inputs()).moe.values()
        now = [sum_statistics([view.statistics for view in layer]) for layer in zip(*views, strict=True)]
        total = now if total is None else [sum_statistics(pair) for pair in zip(total, now, strict=True)]
    if total is None:
        raise ValueError("expert_use needs at least one batch")
    return tuple(total)


def shares(statistics: RouterStatistics) -> Tensor:
    """Return the share of each modality's routes that chose each expert, (2, E) fp32; zeros without tokens."""
    return statistics.routes / statistics.routes.sum(dim=1, keepdim=True).clamp(min=1)


def plot_expert_use(statistics: tuple[RouterStatistics, ...], layers: list[int], path: Path) -> Path:
    """Draw one panel for each MoE layer with the shares of image and text routes that chose each expert.

    Args:
        statistics: statistics of at least one layer, from :func:`expert_use`.
        layers: indices of these layers, counted from 0.
        path: PNG to write.

    Returns:
        The path.
    """
    num_experts = statistics[0].routes.shape[1]
    figure = Figure(figsize=(max(6.5, 2.5 + 0.4 * num_experts), 0.5 + 2.3 * len(statistics)), layout="constrained")
    figure.suptitle("Experts chosen by modality", fontsize=11, color=INK, x=0.01, ha="left")
    panels = figure.subplots(len(statistics), 1, squeeze=False, sharey=True)[:, 0]
    for axes, layer, counted in zip(panels, layers, statistics, strict=True):
        numbers = router_metrics(counted)
        tidy(
            axes,
            f"layer {layer}: router entropy {numbers['entropy']:.2f} of {math.log(num_experts):.2f} nats, "
            f"most used {numbers['max_load']:.2f} x the mean, unused experts {numbers['dead_experts']:.0f}",
        )
        percent = (100 * shares(counted)).tolist()
        for modality, offset, color, label in ((IMAGE, -0.2, IMAGE_COLOR, "image"), (TEXT, 0.2, TEXT_COLOR, "text")):
            places = [expert + offset for expert in range(num_experts)]
            tokens = int(counted.tokens[modality])
            axes.bar(places, percent[modality], width=0.38, color=color, label=f"{label} ({tokens:,} tokens)")
        axes.axhline(100 / num_experts, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xticks(range(num_experts))
        axes.set_xlim(-0.6, num_experts - 0.4)
        axes.set_ylabel("% of routes", fontsize=8, color=INK)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right", ncols=2)
    panels[0].set_ylim(0, 1.22 * panels[0].get_ylim()[1])  # room for the legend
    panels[-1].set_xlabel("expert (dashed: uniform use)", fontsize=8, color=INK)
    return save(figure, path)
