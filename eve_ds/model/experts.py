"""Feed-forward networks of all experts of a layer that this process holds, stacked into one tensor per parameter kind.

State dicts name each expert separately, `0.fc1.weight`, as a ModuleList of :class:`FeedForward` would. DeepSpeed's
checkpoint code and the exported weights depend on these names. Libraries that match the names of a state dict with
parameters, such as accelerate, need the names of the parameters instead: see :attr:`Experts.names_each`. Both kinds of
names load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eve_ds import ops
from eve_ds.model.naming import expert_name


class Experts(nn.Module):
    """Expert e is :class:`eve_ds.model.feed_forward.FeedForward` with `fc1_weight[e]`, `fc1_bias[e]`, and so on.

    The module that runs the op holds all its parameters, so an adapter of a parameter acts on the op.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, intermediate_size))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.names_each = True
        """Whether a state dict names each expert; False: it has the stacked parameters under their own names."""
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_stack)

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert e to its `sizes[e]` rows: (R, D), (E,) int64 -> (R, D); rows past the sum of sizes return zeros.

        An expert without rows gets a zero gradient, so that all ranks have the same set of gradients. The activation,
        quick_gelu, is fused into the op: see `eve_ds/ops/reference.py` and CONTRIBUTING.md.
        """
        return ops.grouped_feed_forward(rows, sizes, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)


def _unstack(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
    """State-dict hook that replaces each stacked tensor by one named view per expert."""
    if not module.names_each:
        return
    for name, _ in module.named_parameters():
        for expert, part in enumerate(state_dict.pop(prefix + name)):
            state_dict[prefix + expert_name(name, expert)] = part


def _stack(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load hook, inverse of `_unstack`; leaves a stacked parameter under its own name as it is.

    It reports experts that are missing or have another shape. A parameter with such an expert keeps its value.
    """
    for name, own in module.named_parameters():
        keys = [prefix + expert_name(name, expert) for expert in range(len(own))]
        if prefix + name in state_dict or not (module.names_each or any(key in state_dict for key in keys)):
            continue
        parts = {key: state_dict.pop(key, None) for key in keys}
        missing = [key for key, part in parts.items() if part is None]
        found = [part for part in parts.values() if part is not None]
        wrong = [key for key, part in parts.items() if part is not None and part.shape != own.shape[1:]]
        missing_keys += missing
        error_msgs += [
            f"size mismatch for {key}: copying a param with shape {parts[key].shape} from checkpoint, "  # type: ignore[union-attr]
            f"the shape in current model is {own.shape[1:]}."
            for key in wrong
        ]
        state_dict[prefix + name] = own.detach() if missing or wrong else torch.stack(found)
