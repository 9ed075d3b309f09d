"""What an export says of itself: a report for programs, and a README.md for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eve_ds.config import Config


@dataclass(frozen=True)
class OutputCheck:
    """Outputs of the exported model against those that the engine recorded, computed in the precision of training."""

    precision: str
    outputs: dict[str, list[int]]
    """Name -> shape."""
    max_abs_diff: float
    relative: float
    """Largest over the outputs of |difference| / |recorded|, as Euclidean norms."""
    tolerance: float


@dataclass(frozen=True)
class ExportReport:
    """What was written; export.json holds the same."""

    checkpoint: str
    step: int
    dtype: str
    """Of the weights in the file; they were made of fp32 masters."""
    tensors: int
    parameters: int
    experts: dict[str, int]
    """Layer -> experts found in it, all different."""
    bytes: int
    """Of model.safetensors, or its parts together."""
    sha256: str
    """Of the same, one after the other."""
    check: OutputCheck | None
    """None where the checkpoint holds no recorded outputs."""


def last_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """The newest evaluation in the metrics of a run up to a step; None where there is none."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return None
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = [record for record in records if record["kind"] == "eval" and record["step"] <= step]
    return found[-1] if found else None


def model_card(report: ExportReport, config: Config, state: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Markdown.

    Args:
        report: what was exported.
        config: of the run.
        state: of the checkpoint: step, samples, topology.
        evaluation: a record of the run's metrics, or None.
    """
    model, check = config.model, report.check
    experts = ", ".join(f"{count} experts in layer {layer}" for layer, count in report.experts.items())
    sources = "; ".join(
        f"{source.kind} {source.shards or source.level}, weight {source.weight:g}" for source in config.data.sources
    )
    topology = ", ".join(f"{name} {value}" for name, value in state.get("topology", {}).items())
    lines = [
        f"# {config.name}",
        "",
        "EVE (Chen et al., AAAI 2024), pre-trained by masked signal modeling with eve_ds.",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {model.num_hidden_layers} layers, width {model.hidden_size}, {experts or 'no experts'} |",
        f"| images, texts | {model.image_size} pixels in patches of {model.patch_size}, {model.text_length} tokens |",
        f"| profile | {model.profile} |",
        f"| parameters | {report.parameters:,} in {report.tensors} tensors, {report.dtype} |",
        f"| checkpoint | {report.checkpoint}: step {report.step}, {state.get('samples', 0):,} samples |",
        f"| trained on | {sources} |",
        f"| trained in | {config.train.precision}, batch {config.train.train_batch_size}, {topology} |",
        f"| sha256 | {report.sha256} |",
    ]
    if check is not None:
        lines.append(
            f"| compared with the training engine | relative difference of outputs {check.relative:.1e}, at most "
            f"{check.tolerance:.0e} allowed in {check.precision} |"
        )
    if evaluation is not None:
        lines += ["", f"Evaluation at step {evaluation['step']}:", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in evaluation.items() if name not in _STAMP]
    lines += ["", "```python", "from eve_ds.export import load", "model, config, tokenizer = load('.')", "```", ""]
    return "\n".join(lines)


_STAMP = {"kind", "step", "seconds", "samples"}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)
