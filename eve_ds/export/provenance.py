"""Provenance of an export: a report for programs, and a model card (README.md) for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eve_ds.config import Config, Objective
from eve_ds.log import get_logger
from eve_ds.printable import markdown
from eve_ds.reading import parse_json, read_lines
from eve_ds.storage import cause

OBJECTIVES: dict[Objective, str] = {
    "mim": "`mim`, masked image modeling: predict the pixels of masked image patches, given the caption.",
    "mlm": "`mlm`, masked language modeling: predict the masked words of a caption, given the image.",
    "itc": "`itc`, image-text contrastive learning: tell the caption of an image from the captions of other images.",
    "itm": "`itm`, image-text matching: decide whether an image and a caption match, on hard negatives.",
    "joint": "`joint`, joint masked modeling: predict masked patches and masked words in one pass over both.",
}
"""Sentence of the model card for each pre-training objective."""


@dataclass(frozen=True)
class OutputCheck:
    """Comparison of the exported model with outputs that the engine recorded, in the precision of training."""

    precision: str
    """Precision of training: fp32, bf16 or fp16."""
    outputs: dict[str, list[int]]
    """Name -> shape."""
    max_abs_diff: float
    """Largest absolute difference over all outputs."""
    relative: float
    """Largest ratio ||difference|| / ||recorded|| over the outputs (Euclidean norms)."""
    tolerance: float
    """Allowed value of `relative`."""


@dataclass(frozen=True)
class ExportReport:
    """Report of an export; export.json contains the same."""

    checkpoint: str
    """Name of the checkpoint folder."""
    step: int
    """Optimizer step of the checkpoint."""
    dtype: str
    """Data type of the exported weights, which are converted from fp32 masters."""
    tensors: int
    parameters: int
    experts: dict[str, int]
    """Layer -> number of its experts, all of which are different."""
    bytes: int
    """Size of model.safetensors, or of all its parts."""
    sha256: str
    """Checksum of model.safetensors, or of its concatenated parts."""
    check: OutputCheck | None
    """Comparison with recorded outputs; None: the checkpoint has none."""


def last_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """Return the newest evaluation in the metrics of a run up to a step; None without one."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return None
    for line in reversed(_lines(metrics)):
        try:
            record = parse_json(line)
            if record["kind"] == "eval" and record["step"] <= step:
                return dict(record)
        except (ValueError, KeyError, TypeError):  # the line of a killed writer, or none of ours
            continue
    return None


def _lines(metrics: Path) -> list[str]:
    try:
        return read_lines(metrics)
    except (OSError, UnicodeDecodeError) as error:
        get_logger().warning("%s cannot be read (%s): the model card has no evaluation", metrics, cause(error))
        return []


def trained_objectives(config: Config) -> list[Objective]:
    """Return the objectives that the run trained: those with a positive loss weight and a source of samples."""
    terms = {"joint": ("mim", "mlm")}
    weights, unserved = config.loss.weights, config.objectives_without_source
    return [
        name
        for name in config.model.objectives
        if name not in unserved and any(weights.get(term, 1.0) > 0 for term in terms.get(name, (name,)))
    ]


def describe_objectives(config: Config) -> str:
    """Return a Markdown list with one sentence, or else the name, of each objective that the run trained."""
    return "\n".join(f"- {OBJECTIVES.get(name, f'`{name}`')}" for name in trained_objectives(config))


def model_card(report: ExportReport, config: Config, state: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Return the model card as Markdown.

    Args:
        report: report of the export.
        config: configuration of the run.
        state: state of the checkpoint: step, samples, topology.
        evaluation: evaluation record from the metrics of the run, or None.
    """
    model, check = config.model, report.check
    experts = ", ".join(f"{count} experts in layer {layer}" for layer, count in report.experts.items())
    sources = "; ".join(
        f"{source.kind} {markdown(str(source.shards or source.level))}, weight {source.weight:g}"
        for source in config.data.sources
    )
    topology = markdown(", ".join(f"{name} {value}" for name, value in state.get("topology", {}).items()))
    lines = [
        f"# {markdown(config.name)}",
        "",
        "EVE (Chen et al., AAAI 2024), pre-trained with eve_ds on these objectives:",
        "",
        describe_objectives(config),
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {model.num_hidden_layers} layers, width {model.hidden_size}, {experts or 'no experts'} |",
        f"| images, texts | {model.image_size} pixels in patches of {model.patch_size}, {model.text_length} tokens |",
        f"| profile | {model.profile} |",
        f"| parameters | {report.parameters:,} in {report.tensors} tensors, {report.dtype} |",
        f"| checkpoint | {markdown(report.checkpoint)}: step {report.step}, {state.get('samples', 0):,} samples |",
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
        rows = [(name, _shown(value)) for name, value in evaluation.items() if name not in _STAMP]
        lines += [f"| {markdown(name)} | {markdown(value)} |" for name, value in rows]
    lines += ["", "```python", "from eve_ds.export import load", "model, config, tokenizer = load('.')", "```", ""]
    return "\n".join(lines)


_STAMP = {"kind", "step", "seconds", "samples"}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)
