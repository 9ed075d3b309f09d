"""Floating-point operations of a step, and the peak of the accelerator."""

from __future__ import annotations

import torch

from eve_ds.config import MaskingConfig, ModelConfig
from eve_ds.data.masking import num_chosen, num_masked_patches

PEAK_FLOPS = {
    ("H100 PCIe", "bf16"): 756e12,
    ("H100 NVL", "bf16"): 835e12,
    ("H100", "bf16"): 989e12,
    ("H200", "bf16"): 989e12,
    ("A100", "bf16"): 312e12,
    ("H100 PCIe", "fp16"): 756e12,
    ("H100 NVL", "fp16"): 835e12,
    ("H100", "fp16"): 989e12,
    ("H200", "fp16"): 989e12,
    ("A100", "fp16"): 312e12,
    ("V100", "fp16"): 125e12,
}
"""Dense tensor-core peak by part of the device's name and precision, FLOP/s, from the makers' data sheets; SXM unless
named otherwise. The first entry that fits counts."""


def peak_flops(precision: str) -> float | None:
    """Peak FLOP/s of this process's accelerator where it is known, otherwise None."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == precision), None)


def pretraining_flops(config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
    """Multiply-adds of one pair's forward in all views, times two (a step costs three forwards).

    Counts matrix products of the encoder (top-k experts in MoE layers), attention scores, pixel decoder and vocabulary
    head; leaves out norms, activations, embeddings and the heads of `itc` and `itm`, as is usual for model FLOP/s
    utilization. `text_tokens` are those of a caption, [CLS] and [SEP] included.
    """
    macs = {
        "mim": _image_view_macs(config, masking, text_tokens, masking.image_view_word_share) * masking.image_view_share,
        "mlm": _pair_macs(config, num_chosen(config.num_patches, masking.language_view_patch_share), text_tokens)
        + _words_macs(config, masking, text_tokens),
        "joint": _image_view_macs(config, masking, text_tokens, 1.0) + _words_macs(config, masking, text_tokens),
        "itc": _pair_macs(config, config.num_patches, 0.0) + _encoder_macs(config, text_tokens),
        "itm": 3 * _pair_macs(config, config.num_patches, text_tokens),
    }
    return 2 * sum(macs[task] for task in config.objectives)


def _image_view_macs(config: ModelConfig, masking: MaskingConfig, text_tokens: float, word_share: float) -> float:
    """Encoder and pixel decoder."""
    masked = num_masked_patches(config.num_patches, masking.patch_mask_ratio)
    predicted = num_chosen(masked, masking.predicted_patch_share)
    visible, shown = config.num_patches - masked, 2 + word_share * max(text_tokens - 2, 0) if text_tokens else 0.0
    return _pair_macs(config, visible, shown) + _decoder_macs(config, 1 + visible + shown, predicted)


def _pair_macs(config: ModelConfig, patches: int, text_tokens: float) -> float:
    """Class token, patches and text through the encoder."""
    return _encoder_macs(config, 1 + patches + text_tokens) + _patch_macs(config, patches)


def _encoder_macs(config: ModelConfig, tokens: float) -> float:
    width, num_moe = config.hidden_size, len(config.expert_layers)
    attention = config.num_hidden_layers * (4 * width * width + 2 * tokens * width)
    networks = (config.num_hidden_layers - num_moe) + num_moe * config.moe.top_k
    return tokens * (attention + networks * 2 * width * config.intermediate_size)


def _patch_macs(config: ModelConfig, patches: int) -> float:
    return patches * 3 * config.patch_size**2 * config.hidden_size


def _words_macs(config: ModelConfig, masking: MaskingConfig, text_tokens: float) -> float:
    """Text head and vocabulary on the share of words that is predicted."""
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
