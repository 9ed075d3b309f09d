"""Records of the training pipeline: a decoded sample, and a masked batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eve_ds.data.pixels import normalized
from eve_ds.views import Layout


@dataclass(frozen=True)
class Sample:
    """One decoded sample, before masking."""

    key: str
    epoch: int
    """Number of earlier passes over the sample's source."""
    image: NDArray[np.uint8] | None
    """(image_size, image_size, 3), cropped and flipped; None without an image."""
    caption: str | None


@dataclass(frozen=True)
class Batch:
    """B samples with their masks; every rank's batches have the same fields, whatever the mixture drew."""

    keys: list[str]
    """Key of each sample, as in the shard."""
    pixel_values: Tensor | None = None
    """(B, 3, H, W) uint8, or floats that are normalized already; bytes take a quarter of the space of a model's input
    (:attr:`normalized_pixels`). None: no source of the mixture has images."""
    image_mask: Tensor | None = None
    """(B,) bool, True = the sample has an image. None: every sample has one."""
    input_ids: Tensor | None = None
    """(B, L) int64 whole captions; L = longest caption of the batch. None: no source has captions."""
    attention_mask: Tensor | None = None
    """(B, L) bool, True = real token; all False for a sample without a caption."""
    image_view_ids: Tensor | None = None
    """(B_i,) int64, ascending: samples of the image view, which have an image. None: all samples."""
    visible_patch_ids: Tensor | None = None
    """(B_i, N_visible) int64, ascending, row-major patch index without the class token. None: no image view."""
    visible_patch_mask: Tensor | None = None
    """(B_i, N_visible) bool, False = hidden from the encoder after all (text to image). None: all are visible."""
    masked_patch_ids: Tensor | None = None
    """(B_i, N_masked) int64, ascending."""
    image_view_text_mask: Tensor | None = None
    """(B_i, L) bool, True = a token that the image view shows. None: it shows all real ones."""
    language_patch_ids: Tensor | None = None
    """(B, N) int64, ascending: patches that the language view shows. None: all."""
    masked_input_ids: Tensor | None = None
    """(B, L) int64 captions with masked tokens replaced. None: no language view."""
    masked_token_ids: Tensor | None = None
    """(M,) int64, ascending flat indices into B * L of the tokens to predict; M may be 0."""
    token_labels: Tensor | None = None
    """(M,) int64, the original tokens."""
    more: dict[str, Tensor] = field(default_factory=dict)
    """Fields that only one pre-training objective uses, by name."""
    layouts: dict[str, Layout] | None = None
    """View -> layout of its tokens. None: the model derives it from the masks, for which the host waits for an
    accelerator."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def normalized_pixels(self) -> Tensor | None:
        """(B, 3, H, W) float32, or the dtype of floats that were given, with mean = std = 0.5.

        Zeros where `image_mask` is False; None without `pixel_values`. Computed once, on the device of the batch.
        """
        if self.pixel_values is None:
            return None
        pixels = normalized(self.pixel_values)
        return pixels if self.image_mask is None else pixels.masked_fill(~self.image_mask[:, None, None, None], 0.0)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the batch, those of layouts included."""
        values = [*self._fields().values(), *self.more.values()]
        values += [value for layout in (self.layouts or {}).values() for value in layout]
        return [value for value in values if isinstance(value, Tensor)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with computation."""
        return self._with_each(Tensor.pin_memory)

    def with_group_tokens(self, tokens: Mapping[str, tuple[int, ...]]) -> Batch:
        """The same batch, whose layouts know the tokens of each rank that shares the experts, by view."""
        if self.layouts is None or not tokens:
            return self
        layouts = {view: layout._replace(tokens_of_group=tokens.get(view)) for view, layout in self.layouts.items()}
        return dataclasses.replace(self, layouts=layouts)

    def first(self, count: int) -> Batch:
        """The first samples of the batch, without layouts, and at least up to the first sample with an image view.

        Flat indices into the text stay valid because rows keep their length. Fields in `more` must have a row per
        sample.
        """
        if self.image_view_ids is not None and len(self.image_view_ids):
            count = max(count, int(self.image_view_ids[0]) + 1)
        in_image_view = count if self.image_view_ids is None else int((self.image_view_ids < count).sum())
        of_image_view = ("image_view_ids", "visible_patch_ids", "visible_patch_mask", "masked_patch_ids")
        rows = dict.fromkeys((*of_image_view, "image_view_text_mask"), in_image_view)
        if self.input_ids is not None and self.masked_token_ids is not None:
            chosen = int((self.masked_token_ids < count * self.input_ids.shape[1]).sum())  # they are ascending
            rows |= {"masked_token_ids": chosen, "token_labels": chosen}
        tensors = {name: value for name, value in self._fields().items() if isinstance(value, Tensor)}
        kept: dict[str, Any] = {name: tensor[: rows.get(name, count)] for name, tensor in tensors.items()}
        more = {name: tensor[:count] for name, tensor in self.more.items()}
        return Batch(keys=self.keys[:count], more=more, **kept)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of `EVE.forward`: everything but keys and labels, pixels normalized."""
        inputs = {name: value for name, value in self._fields().items() if name not in ("keys", "token_labels", "more")}
        return inputs | self.more | {"pixel_values": self.normalized_pixels}

    def targets(self) -> dict[str, Tensor | None]:
        """Tensors that losses compare predictions with, pixels normalized, rows those of the image view."""
        rows = self.image_view_ids
        pixel_values, image_mask = (
            tensor if tensor is None or rows is None else tensor[rows]
            for tensor in (self.normalized_pixels, self.image_mask)
        )
        return {
            "pixel_values": pixel_values,
            "image_mask": image_mask,
            "masked_patch_ids": self.masked_patch_ids,
            "token_labels": self.token_labels,
            **self.more,
        }

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in self._fields().items() if isinstance(value, Tensor)
        }
        if self.layouts is not None:
            changed["layouts"] = {view: layout.with_each(change) for view, layout in self.layouts.items()}
        return dataclasses.replace(self, more={name: change(value) for name, value in self.more.items()}, **changed)

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
