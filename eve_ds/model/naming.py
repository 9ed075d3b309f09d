"""Names of weights in the plain model and in the DeepSpeed model; string functions only, so any module may import them.

plain:     `backbone.blocks.5.moe.experts.7.fc1.weight`, where 7 counts over all experts of the layer
DeepSpeed: `backbone.blocks.5.moe.deepspeed_moe.experts.deepspeed_experts.3.fc1.weight`, where 3 counts on one rank

These are state-dict names. As parameters, experts are stacked: `...experts.fc1_weight` holds all experts of the module,
in order. A rank that holds L experts of a layer owns the global experts [ep_rank * L, (ep_rank + 1) * L). All other
names are equal in both models.
"""

from __future__ import annotations

import re

_EXPERT = re.compile(r"\.moe\.experts\.(\d+)\.")
_STACKED = re.compile(r"\.moe\.(?:experts|deepspeed_moe\.experts\.deepspeed_experts)\.(fc\d_\w+)$")


def expert_name(stacked: str, expert: int) -> str:
    """Name of one expert's part of a stacked parameter: `fc1_weight`, 3 -> `3.fc1.weight`."""
    return f"{expert}.{stacked.replace('_', '.')}"


def is_stacked(name: str) -> bool:
    """Whether a plain or DeepSpeed name belongs to a parameter that holds several experts."""
    return _STACKED.search(name) is not None


def plain_names(name: str, first_expert: int, num_experts: int) -> tuple[str, ...]:
    """Plain names of the contents of parameter `name`: `num_experts` experts from `first_expert` on, or its name."""
    match = _STACKED.search(name)
    if match is None:
        return (name,)
    experts = range(first_expert, first_expert + num_experts)
    return tuple(f"{name[: match.start()]}.moe.experts.{expert_name(match[1], expert)}" for expert in experts)


def expert_id(name: str) -> int | None:
    """Expert id in a plain name; None for other weights."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None
