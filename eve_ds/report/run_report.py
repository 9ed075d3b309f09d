"""Report of one run: report.md and its figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.pipeline import build_loader
from eve_ds.data.synthetic.scenes import Scenes
from eve_ds.evaluation.scenes import evaluation_config
from eve_ds.objectives.registry import objectives_of
from eve_ds.printable import excerpt, markdown
from eve_ds.reading import read_json
from eve_ds.report.curves import plot_curves
from eve_ds.report.experts import expert_use, plot_expert_use
from eve_ds.report.reconstruction import note_on, plot_reconstructions, reconstruct
from eve_ds.report.records import Record, ReportError, of_kind, read_records, throughput
from eve_ds.report.tables import Table, evaluation_tables, expert_table, loss_table
from eve_ds.storage import cause

EXAMPLES, BATCH_SIZE, BATCHES = 8, 64, 8
"""Rows of the grid of reconstructions; batch size and number of batches of the router statistics."""


class Exported(NamedTuple):
    """Result of `eve_ds.export.load`: a plain model in evaluation mode with its configuration and tokenizer."""

    model: nn.Module
    config: Config
    tokenizer: PreTrainedTokenizerFast


def write_report(
    run: Path, out: Path, exported: Exported | None = None, evaluation: dict[str, Any] | None = None
) -> list[Path]:
    """Write `report.md` and its figures.

    Args:
        run: output folder of a run, finished or not.
        out: folder to write to.
        exported: export of the run; None: the report covers only training and evaluation.
        evaluation: result of :func:`eve_ds.evaluation.scenes.evaluate_scenes`; None: the last one of the run, if any.

    Returns:
        The written files, report.md first.

    Raises:
        ReportError: the run has no usable `metrics.jsonl`.
    """
    records = read_records(run)
    tables = [_run_table(run, records), loss_table(records)]
    evaluation = evaluation or next(iter(of_kind(records, "eval")[::-1]), None)
    pictures = {"Loss curves": plot_curves(records, out / "curves.png")}
    if evaluation is not None:
        tables += _evaluation_tables(evaluation)
    if exported is not None:
        more, router = _model_pictures(exported, out)
        pictures |= more
        tables += router
    report = out / "report.md"
    report.write_text(_markdown(run, tables, pictures, of_kind(records, "event")), encoding="utf-8")
    return [report, *pictures.values()]


def sample_batches(config: Config, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Yield batches for figures: validation scenes if the run was trained on scenes only, otherwise training data.

    Masks are those of the evaluation: half of the words are masked, and every masked patch is predicted.
    """
    config, sources = evaluation_config(config), config.data.sources
    objectives = objectives_of(config.model)
    if any(source.kind != "scenes" for source in sources):
        quiet = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
        yield from build_loader(quiet, tokenizer, objectives, rank=0, world_size=1, micro_batch_size=BATCH_SIZE)
    scenes = Scenes(sources[0].level, split="val")
    collate = Collator(config, tokenizer, objectives, has_images=True, has_captions=True)
    start = 0
    while True:
        shown = [(index, scenes[index]) for index in range(start, start + BATCH_SIZE)]
        yield collate([Sample(f"report-{index}", 0, scene.image, scene.caption) for index, scene in shown])
        start += BATCH_SIZE


def _model_pictures(exported: Exported, out: Path) -> tuple[dict[str, Path], list[Table]]:
    model, config, tokenizer = exported
    stream = sample_batches(config, tokenizer)
    batches = [next(stream) for _ in range(BATCHES)]
    on_scenes = all(source.kind == "scenes" for source in config.data.sources)
    pictures, tables = {}, []
    if model.pixel_decoder is not None and batches[0].pixel_values is not None:
        examples = reconstruct(model, batches[0], tokenizer, config.model)[:EXAMPLES]
        kind = "validation scenes" if on_scenes else "samples of the training data"
        title = f"The first {len(examples)} {kind}, not selected"
        path = plot_reconstructions(examples, out / "reconstructions.png", title, note_on(config.model))
        pictures["Masked and reconstructed images, with predicted words"] = path
    if config.model.expert_layers:
        layers = config.model.expert_layers
        statistics = expert_use(model, batches)
        pictures["Expert use by modality"] = plot_expert_use(statistics, layers, out / "experts.png")
        tables.append(expert_table(statistics, layers))
    return pictures, tables


def _run_table(run: Path, records: list[Record]) -> Table:
    numbers = throughput(records)
    last = of_kind(records, "train")[-1]
    rows = [
        ("steps", f"{numbers['steps']:,}"),
        ("samples", f"{last['samples']:,}"),
        ("training seconds", f"{numbers['train_seconds']:,.1f}"),
        ("samples/s", f"{numbers['samples_per_second']:,.1f}"),
        ("peak memory of rank 0", f"{numbers['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    rows += [(f"samples skipped: {key[8:]}", f"{last[key]:,}") for key in last if key.startswith("skipped/")]
    settings = run / "config.json"
    if settings.is_file():
        rows.insert(0, ("configuration", _configuration(settings)))
    return Table("Run", ("", ""), rows)


def _configuration(settings: Path) -> str:
    """Name and seed in the configuration that a run wrote."""
    try:
        tree = read_json(settings)
        return excerpt(f"{tree['name']}, seed {tree['train']['seed']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{settings} is not the configuration of a run: {cause(error)}") from None


def _evaluation_tables(evaluation: dict[str, Any]) -> list[Table]:
    try:
        return evaluation_tables(evaluation)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {excerpt(str(error))}"
        raise ReportError(f"the evaluation is not a result of `evaluate.py scenes`: {problem}") from None


def _markdown(run: Path, tables: list[Table], pictures: dict[str, Path], events: list[Record]) -> str:
    parts = [f"# Report of {markdown(run.name)}\n", *(table.to_markdown() for table in tables)]
    if events:
        lines = [f"- step {event['step']}: {markdown(excerpt(str(event.get('message'))))}" for event in events]
        parts.append("\n".join(["**Events**", "", *lines, ""]))
    parts += [f"## {heading}\n\n![{heading}]({path.name})\n" for heading, path in pictures.items()]
    return "\n".join(parts)
