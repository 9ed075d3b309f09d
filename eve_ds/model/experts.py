"""Feed-forward networks of all experts of a layer that this process holds, stacked into one tensor per parameter kind.

State dicts name each expert separately, `0.fc1.weight`, as a ModuleList of :class:`FeedForward` would. DeepSpeed's
checkpoint code and the exported weights depend on these names, so code that loads weights never sees the stacking.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eve_ds import ops


class StackedLinear(nn.Module):
    """Parameters of `num_experts` linear layers."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))


class Experts(nn.Module):
    """Expert e is :class:`eve_ds.model.feed_forward.FeedForward` with `fc1.weight[e]`, `fc1.bias[e]`, and so on."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = StackedLinear(num_experts, hidden_size, intermediate_size)
        self.fc2 = StackedLinear(num_experts, intermediate_size, hidden_size)
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_stack)

    def forward(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Apply expert e to its `sizes[e]` rows: (R, D), (E,) int64 -> (R, D); rows past the sum of sizes return zeros.

        An expert without rows gets a zero gradient, so that all ranks have the same set of gradients. The activation,
        quick_gelu, is fused into the op: see `eve_ds/ops/reference.py` and CONTRIBUTING.md.
        """
        return ops.grouped_feed_forward(rows, sizes, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def _unstack(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
    """State-dict hook that replaces each stacked tensor by one named view per expert."""
    for name, _ in module.named_parameters():
        for expert, part in enumerate(state_dict.pop(prefix + name)):
            state_dict[f"{prefix}{expert}.{name}"] = part


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
    """Load hook, inverse of `_unstack`.

    It reports experts that are missing or have another shape. A parameter with such an expert keeps its value.
    """
    for name, own in module.named_parameters():
        parts = {key: state_dict.pop(key, None) for key in (f"{prefix}{expert}.{name}" for expert in range(len(own)))}
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
