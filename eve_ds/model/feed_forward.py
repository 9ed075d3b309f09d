"""Feed-forward networks: one of them, and one per modality."""

from __future__ import annotations

from torch import Tensor, nn

from eve_ds import ops
from eve_ds.config import ModelConfig
from eve_ds.model.stream import restore_order, sort_by_modality
from eve_ds.views import IMAGE, TEXT, Packing, joined


class FeedForward(nn.Module):
    """fc1, quick_gelu, fc2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(ops.quick_gelu(self.fc1(x)))


class ModalityFeedForward(nn.Module):
    """LayerNorm and feed-forward network, one pair a modality (upstream `mlp_imag`, `mlp_text`).

    This is the paper's hard router (EVE eq. 7): as many experts as modalities, and each token goes to the expert of its
    own. Shallow layers have it, and on demand the deep ones (`model.deep_ffn`, Table 7).
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
        """(N, D) -> (N, D); where tokens stand is not looked at."""
        return self.network(self.norm(x))
