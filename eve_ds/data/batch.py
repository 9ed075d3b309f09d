"""One batch of the training stream: keys, images, captions and what is masked in both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples with their masks; every rank's batches have the same fields, whatever the mixture drew."""

    keys: list[str]
    """One per sample, as in the shard."""
    pixel_values: Tensor | None = None
    """(B, 3, H, W) float32, normalised to mean = std = 0.5; zeros where `image_mask` is False. None: no source of the
    mixture has images."""
    image_mask: Tensor | None = None
    """(B,) bool, True = the sample has an image. None: every sample has one."""
    visible_patch_ids: Tensor | None = None
    """(B, N_visible) int64, ascending, row-major patch index without the class token."""
    masked_patch_ids: Tensor | None = None
    """(B, N_masked) int64, ascending."""
    input_ids: Tensor | None = None
    """(B, L) int64, masked tokens already replaced; L = longest caption of the batch. None: no source has captions."""
    attention_mask: Tensor | None = None
    """(B, L) bool, True = real token; all False for a sample without a caption."""
    masked_token_ids: Tensor | None = None
    """(M,) int64, ascending flat indices into B * L of the tokens to predict; M may be 0."""
    token_labels: Tensor | None = None
    """(M,) int64, the original tokens."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with computation."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **pinned)  # type: ignore[arg-type]

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `EVE.forward`: every tensor but the labels."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("keys", "token_labels")}

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
