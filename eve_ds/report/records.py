"""Read `metrics.jsonl` as one consistent history, also of a run that was stopped and resumed."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eve_ds.printable import excerpt
from eve_ds.reading import parse_json, read_lines
from eve_ds.storage import cause

Record = dict[str, Any]

FORMER_NAMES = {
    "pixel": "mim",
    "text": "mlm",
    "colour": "color",  # codespell:ignore colour
    "position_to_colour": "position_to_color",
    "colour_to_shape": "color_to_shape",
    "shape_to_colour": "shape_to_color",
    "model_flops_utilisation": "model_flops_utilization",  # codespell:ignore utilisation
}
"""Keys that earlier versions wrote -> keys of this version."""


_STAMP = {"step", "seconds", "samples"}
"""Keys of numbers that every record has."""
BESIDE_LOSSES = (
    *("kind", "step", "seconds", "samples", "lr", "grad_norm", "samples_per_second", "tokens_per_second"),
    *("peak_memory_bytes", "model_flops_utilization"),
    *("step_seconds", "data_wait_seconds", "samples_per_second_per_worker"),
)
"""Keys of a training record that are no loss terms; others that are none have a slash in their name."""


MOST_TERMS = 100
"""Loss terms of a record; each takes a panel of a figure."""


class ReportError(ValueError):
    """Raised if a run cannot be reported; the message names the file and the problem."""


def read_records(run: Path) -> list[Record]:
    """Read all records of a run's `metrics.jsonl`, in order of steps.

    A run that was killed and resumed from an earlier checkpoint has written some steps twice; the later records are
    used. An incomplete last line is ignored. Keys of earlier versions are renamed.

    Raises:
        ReportError: the file does not exist, has no record, or has a line that is not a record.
    """
    path = run / "metrics.jsonl"
    history: list[Record] = []
    try:
        *lines, torn = read_lines(path)
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist: {run} is not the output folder of a run that has started training"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {cause(error)}") from None
    for number, line in enumerate(lines, start=1):
        record = _parse(line, f"{path}:{number}")
        if _went_back(history, record):
            history = [earlier for earlier in history if earlier["step"] < record["step"]]
        history.append(record)
    if not history:
        raise ReportError(f"{path} has no complete record{' yet' if torn else ''}")
    return history


def with_current_names(record: Record) -> Record:
    """Copy of a record or an evaluation, nested ones included, with the keys of :data:`FORMER_NAMES` renamed."""
    return {
        FORMER_NAMES.get(name, name): with_current_names(value) if isinstance(value, dict) else value
        for name, value in record.items()
    }


def loss_terms(record: Record) -> list[str]:
    """Names of the loss terms of a training record: `loss`, the terms of objectives or task, those of the routers.

    Raises:
        ReportError: there is none, or there are more than :data:`MOST_TERMS`.
    """
    names = [name for name in record if name not in BESIDE_LOSSES and "/" not in name]
    if not names:
        raise ReportError("metrics.jsonl has no loss in a training record")
    if len(names) > MOST_TERMS:
        raise ReportError(f"metrics.jsonl has {len(names):,} loss terms, more than the {MOST_TERMS} that are shown")
    return sorted(names, key=lambda name: {"loss": 0, "load_balancing": 2, "router_z": 3}.get(name, 1))


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """Select the records of one kind: `train`, `eval` or `event`."""
    return [record for record in records if record["kind"] == kind]


def column(records: list[Record], name: str) -> NDArray[np.float64]:
    """Return the values of one key, (n,); NaN if the value is missing or was not finite."""
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], dtype=np.float64)


def throughput(records: list[Record]) -> dict[str, float]:
    """Return `train_seconds`, `steps`, `samples_per_second` and `peak_memory_bytes` (maximum of rank 0) of the run.

    Raises:
        ReportError: the run has no training record.
    """
    train = of_kind(records, "train")
    if not train:
        raise ReportError("metrics.jsonl has no training record: the run stopped before its first one")
    last = train[-1]
    return {
        "train_seconds": last["seconds"],
        "steps": last["step"],
        "samples_per_second": last["samples"] / max(last["seconds"], 1e-9),
        "peak_memory_bytes": max(record.get("peak_memory_bytes") or 0 for record in train),
    }


def _went_back(history: list[Record], record: Record) -> bool:
    """Whether a record is the first after a restart; a step has one record of each kind, but any number of events."""
    if not history or history[-1]["step"] < record["step"]:
        return False
    same_step = itertools.takewhile(lambda earlier: earlier["step"] == record["step"], reversed(history))
    again = record["kind"] != "event" and any(earlier["kind"] == record["kind"] for earlier in same_step)
    return again or history[-1]["step"] > record["step"]


def _parse(line: str, where: str) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ReportError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"kind", *_STAMP} <= record.keys():
        raise ReportError(f"{where} is not a record with kind, step, seconds and samples")
    for name in sorted(record if record["kind"] == "train" else _STAMP):
        value = record[name]
        if name != "kind" and not _is_number(value, may_be_missing=name not in _STAMP):
            raise ReportError(f"{where} has {name} {excerpt(repr(value))}, which is no number")
    return with_current_names(record)


def _is_number(value: Any, may_be_missing: bool) -> bool:
    """Whether a value is a number that a float can hold; a missing one is null, or NaN or infinity of other writers."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return may_be_missing
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
