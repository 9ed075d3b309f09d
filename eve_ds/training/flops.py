"""Peak floating-point rate of the accelerator."""

from __future__ import annotations

import torch

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
"""Dense tensor-core peak in FLOP/s from the vendor's data sheets, by part of the device's name and precision; SXM
unless the name says otherwise. The first matching entry is used."""


def peak_flops(precision: str) -> float | None:
    """Return the peak FLOP/s of this process's accelerator; None if unknown."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == precision), None)
