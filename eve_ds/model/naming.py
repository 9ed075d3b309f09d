"""Names of weights in the plain model and in the DeepSpeed one: strings only, so that anybody may import it.

plain:     `backbone.blocks.5.moe.experts.7.fc1.weight`, 7 counted over all experts of the layer
DeepSpeed: `backbone.blocks.5.moe.deepspeed_moe.experts.deepspeed_experts.3.fc1.weight`, 3 counted on one rank

These are the names of state dicts. As parameters, experts are stacked: `...experts.fc1.weight` are all that a module
holds, in order. A rank that holds L experts of a layer owns the global ones [ep_rank * L, (ep_rank + 1) * L). All other
names are equal.
"""

from __future__ import annotations

import re

_EXPERT = re.compile(r"\.moe\.experts\.(\d+)\.")
_STACKED = re.compile(r"\.moe\.(experts|deepspeed_moe\.experts\.deepspeed_experts)\.(?=fc\d)")


def is_stacked(name: str) -> bool:
    """Whether a plain or DeepSpeed name is that of a parameter which holds several experts."""
    return _STACKED.search(name) is not None


def plain_names(name: str, first_expert: int, num_experts: int) -> tuple[str, ...]:
    """Plain names of what the parameter `name` holds: `num_experts` experts from `first_expert` on, or itself."""
    if not is_stacked(name):
        return (name,)
    return tuple(_STACKED.sub(f".moe.experts.{first_expert + expert}.", name) for expert in range(num_experts))


def expert_id(name: str) -> int | None:
    """The expert that a plain name belongs to; None for other weights."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None
