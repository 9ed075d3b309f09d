"""Multiply-adds of the parts of a forward pass, which objectives add up to their cost."""

from __future__ import annotations

from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.data.masking import num_chosen, num_masked_patches


def image_view_macs(config: ModelConfig, masking: MaskingConfig, text_tokens: float, word_share: float) -> float:
    """Multiply-adds of encoder and pixel decoder on a masked image beside a share of the words of its caption."""
    masked = num_masked_patches(config.num_patches, masking.patch_mask_ratio)
    predicted = num_chosen(masked, masking.predicted_patch_share)
    visible, shown = config.num_patches - masked, 2 + word_share * max(text_tokens - 2, 0) if text_tokens else 0.0
    return pair_macs(config, visible, shown) + _decoder_macs(config, 1 + visible + shown, predicted)


def pair_macs(config: ModelConfig, patches: int, text_tokens: float) -> float:
    """Multiply-adds of the encoder on class token, patches and text of one pair, patch projection included."""
    return encoder_macs(config, 1 + patches + text_tokens) + _patch_macs(config, patches)


def encoder_macs(config: ModelConfig, tokens: float) -> float:
    """Multiply-adds of the blocks on the tokens of one sample."""
    width, num_moe = config.hidden_size, len(config.expert_layers)
    attention = config.num_hidden_layers * (4 * width * width + 2 * tokens * width)
    networks = (config.num_hidden_layers - num_moe) + num_moe * config.moe.top_k
    return tokens * (attention + networks * 2 * width * config.intermediate_size)


def _patch_macs(config: ModelConfig, patches: int) -> float:
    return patches * 3 * config.patch_size**2 * config.hidden_size


def words_macs(config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
    """Multiply-adds of text head and vocabulary on the mean share of masked words."""
    low, high = masking.text_mask_ratio, masking.max_text_mask_ratio
    share = low if high is None else (low + high) / 2
    return share * text_tokens * config.hidden_size * (config.hidden_size + config.vocab_size)


def _decoder_macs(config: ModelConfig, tokens: float, masked: int) -> float:
    decoder, patch = config.pixel_decoder, 3 * config.patch_size**2
    width = decoder.hidden_size
    if decoder.kind == "self":
        rows = masked + tokens
        layers = decoder.num_layers * rows * (12 * width * width + 2 * rows * width)
        return tokens * config.hidden_size * width + layers + masked * width * patch
    queries = masked * (10 * width * width + 2 * tokens * width)
    memory = tokens * 2 * config.hidden_size * width
    return decoder.num_layers * (queries + memory) + masked * width * patch
