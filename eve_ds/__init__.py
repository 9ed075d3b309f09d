"""EVE: one vision-language Transformer with modality-aware experts, pre-trained by masked prediction."""

__version__ = "0.2.0"
