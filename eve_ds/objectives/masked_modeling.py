"""Masked signal modeling (EVE eq. 8 to 10): objectives `mim`, `mlm`, and `joint`, which does both in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from eve_ds import ops
from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.data.masking import choose_patches, num_chosen, sample_rng
from eve_ds.model.decoders import PixelDecoder, TextHead
from eve_ds.objectives import flops
from eve_ds.objectives.objective import Counts, Gather, Objective
from eve_ds.views import View, chosen_samples, only_captioned_images, whole_view

if TYPE_CHECKING:
    from eve_ds.data.batch import Batch
    from eve_ds.data.batch_masks import Collated, Masker
    from eve_ds.model.eve import EVE, BackboneOutput, EVEOutput

PATCHES, WORDS = "masked_patches", "masked_tokens"
"""Keys of :data:`eve_ds.objectives.objective.Counts`."""


class MaskedImage(Objective):
    """`mim`: predict the pixels of the masked patches of an image beside the whole caption."""

    name = "mim"

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Return the pixel decoder."""
        return {"pixel_decoder": lambda: PixelDecoder(config)}

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Choose patches to hide and to predict, for the drawn share of samples with an image."""
        if not masker.has_images:
            return {}
        config = masker.config
        rngs = {
            row: sample_rng(masker.seed, sample.epoch, sample.key, "mim")
            for row, sample in enumerate(batch.samples)
            if sample.image is not None
        }
        if config.image_view_share < 1:
            rngs = {row: rng for row, rng in rngs.items() if rng.random() < config.image_view_share}
        text_to_image = [masker.is_text_to_image(batch.samples[row], rng) for row, rng in rngs.items()]
        fields = masker.patch_masks(list(rngs.values()), text_to_image)
        if len(rngs) < len(batch.samples):
            fields["image_view_ids"] = torch.tensor(list(rngs), dtype=torch.int64)
        if masker.has_captions and config.image_view_word_share < 1:
            captions = [(batch.tokens[row], rng) for row, rng in rngs.items()]
            fields["image_view_text_mask"] = masker.shown_words(captions, batch.length)
        return fields

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return `mim`: the visible patches beside the caption, or beside a share of its words."""
        if inputs.get("pixel_values") is None:
            return {}
        view = chosen_samples(whole_view(inputs), inputs.get("image_view_ids"))
        if inputs.get("image_view_text_mask") is not None:
            view = view._replace(attention_mask=inputs["image_view_text_mask"])
        return {"mim": _with_visible_patches(view, inputs)}

    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `pixel_predictions`."""
        return _predict_pixels(model, encoded.get("mim"), inputs)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the number of predicted patches."""
        return {PATCHES: num_predicted_patches(batch)}

    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return `mim`: squared error per masked patch (EVE eq. 8)."""
        return pixel_loss(output, targets, counts, config)

    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of encoder and pixel decoder, times the share of samples that have the view."""
        macs = flops.image_view_macs(config, masking, text_tokens, masking.image_view_word_share)
        return macs * masking.image_view_share


class MaskedWords(Objective):
    """`mlm`: predict the masked words of a caption beside the whole image."""

    name = "mlm"

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Return the text head."""
        return {"text_head": lambda: TextHead(config)}

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Choose words to hide, and the patches that the view shows."""
        if not masker.has_captions:
            return {}
        share = masker.config.language_view_patch_share
        rngs = [sample_rng(masker.seed, sample.epoch, sample.key, "mlm") for sample in batch.samples]
        fields: dict[str, Tensor | None] = {}
        if masker.has_images and share < 1:
            patches = np.stack([choose_patches(masker.num_patches, share, rng) for rng in rngs])
            fields["language_patch_ids"] = torch.from_numpy(patches)
        return fields | masker.token_masks(batch, rngs, [False] * len(batch.samples))

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return `mlm`: the masked caption beside the image, or beside a share of its patches."""
        if inputs.get("input_ids") is None:
            return {}
        view = only_captioned_images(masked_view(inputs))
        return {"mlm": view._replace(visible_patch_ids=inputs.get("language_patch_ids"))}

    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `token_hidden`."""
        return _predict_words(model, encoded.get("mlm"), inputs)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the number of masked words."""
        return {WORDS: num_masked_words(batch)}

    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return `mlm`: cross entropy per masked word (EVE eq. 9)."""
        return word_loss(output, targets, counts)

    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of encoder, text head and vocabulary."""
        patches = num_chosen(config.num_patches, masking.language_view_patch_share)
        return flops.pair_macs(config, patches, text_tokens) + flops.words_macs(config, masking, text_tokens)


class Joint(Objective):
    """`joint`: predict patches and words in one pass over a masked image beside a masked caption.

    EVE Table 5 advises against it.
    """

    name = "joint"

    def heads(self, config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
        """Return the pixel decoder and the text head."""
        return {"pixel_decoder": lambda: PixelDecoder(config), "text_head": lambda: TextHead(config)}

    def masks(self, masker: Masker, batch: Collated) -> dict[str, Tensor | None]:
        """Choose patches and words to hide; a text-to-image sample hides more patches and no words."""
        rngs = [sample_rng(masker.seed, sample.epoch, sample.key) for sample in batch.samples]
        text_to_image = [masker.is_text_to_image(sample, rng) for sample, rng in zip(batch.samples, rngs, strict=True)]
        fields = masker.patch_masks(rngs, text_to_image) if masker.has_images else {}
        return fields | (masker.token_masks(batch, rngs, text_to_image) if masker.has_captions else {})

    def views(self, inputs: Mapping[str, Any]) -> dict[str, View]:
        """Return `joint`: the visible patches beside the masked caption."""
        return {"joint": _with_visible_patches(masked_view(inputs), inputs)}

    def predict(
        self, model: EVE, encoded: dict[str, BackboneOutput], inputs: Mapping[str, Any], made: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `pixel_predictions` and `token_hidden`."""
        view = encoded.get("joint")
        return _predict_pixels(model, view, inputs) | _predict_words(model, view, inputs)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Return the numbers of predicted patches and of masked words."""
        return {PATCHES: num_predicted_patches(batch), WORDS: num_masked_words(batch)}

    def losses(
        self, output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig, gather: Gather
    ) -> dict[str, Tensor]:
        """Return `mim` and `mlm`."""
        return pixel_loss(output, targets, counts, config) | word_loss(output, targets, counts)

    def forward_macs(self, config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
        """Multiply-adds of one pass through the encoder, and of both heads."""
        return flops.image_view_macs(config, masking, text_tokens, 1.0) + flops.words_macs(config, masking, text_tokens)


def masked_view(inputs: Mapping[str, Any]) -> View:
    """Return all images beside the masked captions, or beside the whole captions if the batch masks none."""
    view, masked = whole_view(inputs), inputs.get("masked_input_ids")
    return view if masked is None else view._replace(input_ids=masked)


def _with_visible_patches(view: View, inputs: Mapping[str, Any]) -> View:
    return view._replace(
        visible_patch_ids=inputs.get("visible_patch_ids"), visible_patch_mask=inputs.get("visible_patch_mask")
    )


def _predict_pixels(model: EVE, view: BackboneOutput | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    visible, masked = inputs.get("visible_patch_ids"), inputs.get("masked_patch_ids")
    if model.pixel_decoder is None or view is None or visible is None or masked is None:
        return {}
    return {"pixel_predictions": model.pixel_decoder(view.stream, visible, masked)}


def _predict_words(model: EVE, view: BackboneOutput | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    masked = inputs.get("masked_token_ids")
    if model.text_head is None or view is None or masked is None:
        return {}
    return {"token_hidden": model.text_head(_text_tokens(view, masked))}


def _text_tokens(encoded: BackboneOutput, ids: Tensor) -> Tensor:
    """Return states (M, D) of the text tokens with the flat indices `ids` (M,) into B * L."""
    layout = encoded.stream.layout
    length = layout.mask.shape[1]
    text_length = length - encoded.num_image_tokens
    positions = ids // text_length * length + encoded.num_image_tokens + ids % text_length
    return encoded.stream.hidden_states.index_select(0, layout.places[positions])


def num_predicted_patches(batch: Batch) -> float:
    """Count the masked patches to predict in a micro-batch."""
    if batch.masked_patch_ids is None:
        return 0.0
    samples, patches = batch.masked_patch_ids.shape
    if batch.image_mask is not None and batch.image_view_ids is None:
        samples = int(batch.image_mask.sum())
    return float(samples * patches)


def num_masked_words(batch: Batch) -> float:
    """Count the masked words to predict in a micro-batch."""
    return 0.0 if batch.token_labels is None else float(batch.token_labels.numel())


def pixel_loss(output: EVEOutput, targets: Mapping[str, Any], counts: Counts, config: ModelConfig) -> dict[str, Tensor]:
    """Compute `mim`: squared error per masked patch against raw or normalized pixels, () fp32.

    The result is empty if the batch has no image view.

    Args:
        output: predictions, of which `pixel_predictions` are used.
        targets: `pixel_values` (B_i, 3, H, W) of the view's samples, `image_mask` (B_i,) bool, False = no image, or
            None, and `masked_patch_ids` (B_i, N_masked) int64.
        counts: denominators, of which :data:`PATCHES` is used.
        config: patch size and pixel target.
    """
    pixel_values, masked, image_mask = (targets.get(n) for n in ("pixel_values", "masked_patch_ids", "image_mask"))
    if output.pixel_predictions is None or pixel_values is None or masked is None:
        return {}
    per_patch = ops.masked_pixel_loss(
        pixel_values, output.pixel_predictions, masked, config.patch_size, normalize=config.normalizes_pixels
    )
    if image_mask is not None:
        per_patch = per_patch * image_mask.unsqueeze(1)
    return {"mim": per_patch.sum() / (counts[PATCHES] or 1.0)}


def word_loss(output: EVEOutput, targets: Mapping[str, Any], counts: Counts) -> dict[str, Tensor]:
    """Compute `mlm`: cross entropy per masked word, () fp32, from `token_labels` (M,) int64; empty without captions."""
    labels = targets.get("token_labels")
    if output.token_hidden is None or labels is None:
        return {}
    total = output.vocabulary.cross_entropy(output.token_hidden, labels)
    return {"mlm": total / (counts[WORDS] or 1.0)}
