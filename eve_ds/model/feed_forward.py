"""Feed-forward networks: the plain network, one network per modality, and one network for all modalities."""

from __future__ import annotations

from torch import Tensor, nn

from eve_ds import ops
from eve_ds.config import ModelConfig
from eve_ds.model.stream import restore_order, sort_by_modality
from eve_ds.views import IMAGE, TEXT, Packing, joined


class FeedForward(nn.Module):
    """Feed-forward network: fc1, quick_gelu, fc2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(ops.quick_gelu(self.fc1(x)))


class ModalityFeedForward(nn.Module):
    """LayerNorm and feed-forward network, one pair per modality (upstream `mlp_imag`, `mlp_text`).

    This is the paper's hard router (EVE eq. 7): one expert per modality, and each token goes to the expert of its own
    modality. Shallow layers always use it; deep layers use it if `model.deep_ffn` selects it (Table 7).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_image = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_text = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.image = FeedForward(width, config.intermediate_size)
        self.text = FeedForward(width, config.intermediate_size)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(N, D) -> (N, D)."""
        branches = {IMAGE: (self.norm_image, self.image), TEXT: (self.norm_text, self.text)}
        rows = sort_by_modality(x, packing).split(list(packing.sizes.values()))
        done = []
        for modality, own in zip(packing.sizes, rows, strict=True):
            norm, network = branches[modality]
            done.append(network(norm(own)))
        return restore_order(joined(done), packing)


class SharedFeedForward(nn.Module):
    """LayerNorm and one feed-forward network for the tokens of all modalities (EVE Table 7, shared)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.network = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(N, D) -> (N, D); ignores the packing."""
        return self.network(self.norm(x))
