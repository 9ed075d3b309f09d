"""Tables of a run and of its evaluation, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import rich.box
import rich.table
from rich.text import Text

from eve_ds.data.synthetic.scenes import WORD_CLASSES
from eve_ds.model.moe import RouterStatistics, router_metrics
from eve_ds.printable import markdown, printable
from eve_ds.report.experts import shares
from eve_ds.report.records import Record, column, loss_terms, of_kind

LABELS = {"hidden_words": "all words of hidden captions"}
PROBES = {
    "position_to_color": "position -> color",
    "position_to_shape": "position -> shape",
    "color_to_shape": "color -> shape",
    "shape_to_color": "shape -> color",
}


class Table(NamedTuple):
    """A title, headings and rows of the same length; the first column is text, the others are right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def to_markdown(self) -> str:
        """Return the table as GitHub-flavored Markdown."""
        rule = " | ".join(["---", *["---:"] * (len(self.columns) - 1)])
        body = [" | ".join(map(markdown, row)) for row in (self.columns, *self.rows)]
        lines = [f"| {line} |" for line in (body[0], rule, *body[1:])]
        return "\n".join([f"**{markdown(self.title)}**", "", *lines, ""])

    def to_rich(self) -> rich.table.Table:
        """Return the table for a terminal."""
        # A string would be parsed as markup.
        title = Text(printable(self.title), style="table.title")
        table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, name in enumerate(self.columns):
            table.add_column(Text(printable(name)), justify="right" if index else "left", no_wrap=bool(index))
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table


def metrics_table(title: str, metrics: dict[str, Any]) -> Table:
    """Return a table of the metrics of a task; nested names are joined by dots, missing values are dashes."""
    return Table(title, ("metric", "value"), [(name, _figure(value)) for name, value in _flat(metrics)])


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def evaluation_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result of :func:`eve_ds.evaluation.scenes.evaluate_scenes`: words, pixels, binding.

    Results of earlier versions, which predicted words only with masked images, have no `masked_image`.
    """
    tables = []
    masked = result.get("masked_image", {})
    if "color" in result:
        given = "the whole image" if masked else "a masked image"
        names = [*WORD_CLASSES, *(["hidden_words"] if "hidden_words" in result else [])]
        tables.append(_words_table(f"Masked words predicted correctly, given {given}", result, names))
    if masked:
        tables.append(_words_table("Masked words predicted correctly, given a masked image", masked, WORD_CLASSES))
    if "pixel_loss" in result:
        tables.append(_pixels_table(result["pixel_loss"]))
    if "binding" in result:
        tables.append(_binding_table(result["binding"]))
    return tables


def _words_table(title: str, result: dict[str, Any], names: Sequence[str]) -> Table:
    return Table(
        title,
        ("word class", "with its image", "with another image", "gap"),
        [
            (
                LABELS.get(name, name),
                *_pair(result[name]),
                f"{result[name]['right'] - result[name]['wrong']:+.3f}",
            )
            for name in names
        ],
    )


def _pixels_table(pixel_loss: dict[str, float]) -> Table:
    right, wrong = (f"{pixel_loss[side]:.4f}" for side in ("right", "wrong"))
    return Table(
        "Loss of masked foreground pixels",
        ("", "with its caption", "with another caption", "lower by"),
        [("squared error", right, wrong, percent_lower(pixel_loss))],
    )


def percent_lower(pixel_loss: dict[str, float]) -> str:
    """Return by how much the right caption lowers the loss, for example `8.0 %`; a dash if the other loss is 0."""
    return f"{100 * (1 - pixel_loss['right'] / pixel_loss['wrong']):.1f} %" if pixel_loss["wrong"] else "-"


def _binding_table(binding: dict[str, dict[str, float]]) -> Table:
    return Table(
        "Binding: an attribute of the object that another attribute identifies",
        ("given -> predicted", "identified object", "other object", "gap"),
        [
            (label, f"{answer['target']:.3f}", f"{answer['distractor']:.3f}", f"{_gap(answer):+.3f}")
            for name, label in PROBES.items()
            for answer in [binding[name]]
        ],
    )


def _gap(answer: dict[str, float]) -> float:
    return answer["target"] - answer["distractor"]


def _pair(value: dict[str, float]) -> tuple[str, str]:
    return f"{value['right']:.3f}", f"{value['wrong']:.3f}"


def seeds_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one column per seed: results of the evaluation and cost of the training.

    Args:
        entries: for each seed, the result of :func:`eve_ds.evaluation.scenes.evaluate_scenes` for a model that predicts
            words and pixels, with the keys `seed`, `train_seconds`, `steps`, `samples_per_second`,
            `peak_memory_bytes` and `export_max_abs_diff` added.
    """
    rows = [("accuracy of masked words, right image / wrong image", *[""] * len(entries))]
    names = (*WORD_CLASSES, "hidden_words")
    rows += [(f"  {LABELS.get(name, name)}", *(" / ".join(_pair(entry[name])) for entry in entries)) for name in names]
    rows.append(("the same, given a masked image", *[""] * len(entries)))
    masked = [entry["masked_image"] for entry in entries]
    rows += [(f"  {name}", *(" / ".join(_pair(words[name])) for words in masked)) for name in WORD_CLASSES]
    rows.append(("masked pixels, right caption / wrong caption", *[""] * len(entries)))
    losses = [entry["pixel_loss"] for entry in entries]
    rows.append(("  squared error", *(f"{loss['right']:.4f} / {loss['wrong']:.4f}" for loss in losses)))
    rows.append(("  lower by", *map(percent_lower, losses)))
    rows.append(("binding, identified object / other object", *[""] * len(entries)))
    for name, label in PROBES.items():
        answers = [entry["binding"][name] for entry in entries]
        rows.append((f"  {label}", *(f"{answer['target']:.3f} / {answer['distractor']:.3f}" for answer in answers)))
    rows.append(("training", *[""] * len(entries)))
    rows.append(("  seconds", *(f"{entry['train_seconds']:.1f}" for entry in entries)))
    rows.append(("  steps", *(f"{entry['steps']:,}" for entry in entries)))
    rows.append(("  samples/s", *(f"{entry['samples_per_second']:.1f}" for entry in entries)))
    rows.append(("  peak memory of a rank", *(f"{entry['peak_memory_bytes'] / 2**20:,.0f} MiB" for entry in entries)))
    rows.append(("  export: largest difference", *(_difference(entry["export_max_abs_diff"]) for entry in entries)))
    return Table("Results of the demo", ("", *(f"seed {entry['seed']}" for entry in entries)), rows)


def _difference(value: float | None) -> str:
    return "not checked" if value is None else f"{value:.1e}"


def loss_table(records: list[Record]) -> Table:
    """Return a table of each loss term in the first and in the last training record."""
    train = of_kind(records, "train")
    rows = []
    for name in loss_terms(train[0]):
        values = column(train, name)
        if not math.isnan(values[0]):
            rows.append((name, f"{values[0]:.4f}", f"{values[-1]:.4f}", f"{values[-1] - values[0]:+.4f}"))
    first, last = (f"steps to {train[place]['step']:,}" for place in (0, -1))
    if len(train) > 1:
        last = f"steps {train[-2]['step'] + 1:,} to {train[-1]['step']:,}"
    return Table("Loss terms, means over steps", ("term", first, last, "change"), rows)


def expert_table(statistics: tuple[RouterStatistics, ...], layers: list[int]) -> Table:
    """Return a table of the router statistics of each MoE layer.

    The share of image routes of an `image expert` is at least twice its share of text routes; `text experts` likewise.
    """
    rows = []
    for layer, counted in zip(layers, statistics, strict=True):
        numbers = router_metrics(counted)
        image, text = shares(counted)
        rows.append(
            (
                str(layer),
                f"{100 * numbers['image_share']:.0f} %",
                f"{numbers['entropy']:.2f} of {math.log(len(image)):.2f}",
                f"{numbers['max_load']:.2f}",
                f"{numbers['dead_experts']:.0f}",
                str(int((image >= 2 * text).sum())),
                str(int((text >= 2 * image).sum())),
            )
        )
    columns = ("MoE layer", "image tokens", "entropy (nats)", "max load", "unused", "image experts", "text experts")
    return Table("Router", columns, rows)
