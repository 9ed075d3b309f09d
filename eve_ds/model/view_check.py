"""Refuse a view whose tensors do not fit the model or each other, before an operation fails on their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from eve_ds.views import View


def check_view(view: View, image_size: int) -> None:
    """Check types, shapes and dtypes of the inputs of one view, and the values of masks that are not bool.

    Args:
        view: inputs of the encoder; a batch of 0 samples is valid.
        image_size: height and width of the model's images, in pixels.

    Raises:
        ValueError: an input is no tensor, or has another shape or dtype than :class:`eve_ds.views.View` describes, or
            a mask holds another value than 0 and 1.
    """
    for name, value in view._asdict().items():
        if name != "layout" and value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}: pass a tensor")
    pixel_values, input_ids = view.pixel_values, view.input_ids
    if pixel_values is not None:
        _check_pixels(pixel_values, image_size)
    if input_ids is not None:
        _check_ids(input_ids)
    if pixel_values is not None and input_ids is not None and len(pixel_values) != len(input_ids):
        raise ValueError(
            f"pixel_values has {len(pixel_values)} samples and input_ids has {len(input_ids)}: pass one text for every "
            "image"
        )
    if pixel_values is not None:
        _check_image_masks(view, len(pixel_values))
    if input_ids is not None:
        _check_mask("attention_mask", view.attention_mask, tuple(input_ids.shape))


def _check_pixels(pixel_values: Tensor, image_size: int) -> None:
    if tuple(pixel_values.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)} must be (batch, 3, {image_size}, {image_size}): "
            f"convert images to RGB and resize them to image_size ({image_size})"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values ({pixel_values.dtype}) must be floating-point: normalize pixels to -1..1")


def _check_ids(input_ids: Tensor) -> None:
    shape = tuple(input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids {shape} must be (batch, tokens): add a dimension for one text")
    if shape[1] == 0:
        raise ValueError(f"input_ids {shape} must have a token, [CLS]: leave out texts for images alone")
    _check_index("input_ids", input_ids, "token ids")


def _check_image_masks(view: View, batch: int) -> None:
    _check_mask("image_mask", view.image_mask, (batch,))
    ids = view.visible_patch_ids
    if ids is not None and (ids.ndim != 2 or len(ids) != batch):
        raise ValueError(f"visible_patch_ids {tuple(ids.shape)} must be ({batch}, patches): a row for every image")
    if ids is None and view.visible_patch_mask is not None:
        raise ValueError("visible_patch_mask needs visible_patch_ids, whose entries it marks: pass both")
    if ids is not None:
        _check_index("visible_patch_ids", ids, "the ids of the patches in the view")
        _check_mask("visible_patch_mask", view.visible_patch_mask, tuple(ids.shape))


def _check_index(name: str, ids: Tensor, what: str) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} ({ids.dtype}) must be int64: pass {what}")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask of another shape, or one of another kind: 0 and -inf to add to scores, or numbers of segments."""
    if mask is None:
        return
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} {tuple(mask.shape)} must be {shape}, one value for every entry it marks")
    if mask.dtype == torch.bool:
        return
    others = mask[(mask != 0) & (mask != 1)]
    if len(others):
        raise ValueError(
            f"{name} holds {others[0].item():g}, but only 1 and 0 (True and False) have a meaning: 1 marks an entry "
            "that is there, 0 one that is not"
        )
