"""Refuse a view whose tensors do not fit the model or each other, before an operation fails on their shapes."""

from __future__ import annotations

from torch import Tensor

from eve_ds.views import View


def check_view(view: View, image_size: int) -> None:
    """Check shapes and dtypes of the inputs of one view.

    Args:
        view: inputs of the encoder; a batch of 0 samples is valid.
        image_size: height and width of the model's images, in pixels.

    Raises:
        ValueError: a tensor has another shape or dtype than :class:`eve_ds.views.View` describes.
    """
    if view.pixel_values is not None and view.input_ids is not None:
        images, texts = len(view.pixel_values), len(view.input_ids)
        if images != texts:
            raise ValueError(
                f"pixel_values has {images} samples and input_ids has {texts}: pass one text for every image"
            )
    if view.pixel_values is not None:
        _check_images(view, view.pixel_values, image_size)
    if view.input_ids is not None:
        _check_texts(view, view.input_ids)


def _check_images(view: View, pixel_values: Tensor, image_size: int) -> None:
    expected = (3, image_size, image_size)
    if tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)} must be (batch, 3, {image_size}, {image_size}): "
            f"convert images to RGB and resize them to image_size ({image_size})"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values ({pixel_values.dtype}) must be floating-point: normalize pixels to -1..1")
    batch = len(pixel_values)
    _check_shape("image_mask", view.image_mask, (batch,))
    ids = view.visible_patch_ids
    if ids is not None and (ids.ndim != 2 or len(ids) != batch):
        raise ValueError(f"visible_patch_ids {tuple(ids.shape)} must be ({batch}, patches): a row for every image")
    if ids is None and view.visible_patch_mask is not None:
        raise ValueError("visible_patch_mask needs visible_patch_ids, whose entries it marks: pass both")
    _check_shape("visible_patch_mask", view.visible_patch_mask, None if ids is None else tuple(ids.shape))


def _check_texts(view: View, input_ids: Tensor) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} must be (batch, tokens): add a dimension for one text")
    if input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} must have a token, [CLS]: leave out texts for images alone"
        )
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids ({input_ids.dtype}) must be int64: pass token ids")
    _check_shape("attention_mask", view.attention_mask, tuple(input_ids.shape))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...] | None) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}, one value for every entry it marks")
