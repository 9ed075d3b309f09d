"""What a run says while it runs: metrics.jsonl (every number, the contract), one progress line, throughput."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eve_ds.config import ModelConfig
from eve_ds.distributed import get_logger, rank_zero

PEAK_FLOPS = {
    ("H100", "bf16"): 989e12,
    ("H200", "bf16"): 989e12,
    ("A100", "bf16"): 312e12,
    ("H100", "fp16"): 989e12,
    ("H200", "fp16"): 989e12,
    ("A100", "fp16"): 312e12,
    ("V100", "fp16"): 125e12,
}
"""Dense tensor-core peak by part of the device's name and precision, FLOP/s, from the makers' data sheets (SXM)."""


class MetricsWriter:
    """Appends one JSON object a line to `metrics.jsonl`; rank 0 only, other ranks write nothing."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if rank_zero() else None

    def write(self, kind: str, *, step: int, seconds: float, samples: int, **numbers: Any) -> None:
        """One record; `kind` is `train`, `eval` or `event`, `seconds` training time, `samples` those of the run."""
        if self._file is not None:
            record = {"kind": kind, "step": step, "seconds": round(seconds, 3), "samples": samples, **numbers}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class ProgressLine:
    """A live line on a terminal, otherwise one plain log line every `log_every` steps; rank 0 only."""

    def __init__(self, log_every: int) -> None:
        self._log_every = log_every
        self._live = rank_zero() and sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True) if self._live else None
        self._task = self._progress.add_task("starting", total=1.0) if self._progress else None
        self._started = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, step: int, fraction: float, numbers: dict[str, float]) -> None:
        """Show the newest numbers; `fraction` of the run is done."""
        if not rank_zero():
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=fraction, description=_line(step, numbers))
        elif step % self._log_every == 0:
            elapsed = time.monotonic() - self._started
            left = elapsed * (1 - fraction) / max(fraction, 1e-6)
            get_logger().info("%s  eta %.0f s", _line(step, numbers), left)


def _line(step: int, numbers: dict[str, float]) -> str:
    shown = ("loss", "pixel", "text", "load_balancing", "lr", "samples_per_second")
    return f"step {step}  " + "  ".join(f"{name} {numbers[name]:.4g}" for name in shown if name in numbers)


def forward_flops(config: ModelConfig, *, visible_patches: int, masked_patches: int, text_tokens: float) -> float:
    """Multiply-adds of one pre-training sample's forward, times two (a training step costs three forwards).

    Counts matrix products of the encoder (top-k experts in MoE layers), attention scores, pixel decoder and vocabulary
    head; leaves out norms, activations and embeddings, as is usual for model FLOP/s utilisation.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    tokens = 1 + visible_patches + text_tokens
    num_moe = len(set(config.moe_layers))
    attention = config.num_hidden_layers * (4 * width * width + 2 * tokens * width)
    networks = (config.num_hidden_layers - num_moe) + num_moe * config.moe.top_k
    encoder = tokens * (attention + networks * 2 * width * ffn)
    patch = 3 * config.patch_size**2
    text = 0.5 * text_tokens * (width * width + width * config.vocab_size)
    return 2 * (encoder + visible_patches * patch * width + _decoder_macs(config, tokens, masked_patches) + text)


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


def peak_flops(precision: str) -> float | None:
    """Peak FLOP/s of this process's accelerator where it is known, otherwise None."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == precision), None)


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: allocated on the accelerator, or resident on the host without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
