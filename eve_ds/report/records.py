"""Read `metrics.jsonl` as one consistent history, also of a run that was stopped and resumed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


BESIDE_LOSSES = (
    *("kind", "step", "seconds", "samples", "lr", "grad_norm", "samples_per_second", "tokens_per_second"),
    *("peak_memory_bytes", "model_flops_utilization"),
)
"""Keys of a training record that are no loss terms; others that are none have a slash in their name."""


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
    if not path.is_file():
        raise ReportError(f"{path} does not exist: {run} is not the output folder of a run that has started training")
    history: list[Record] = []
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
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
    """Names of the loss terms of a training record: `loss`, the terms of objectives or task, those of the routers."""
    names = [name for name in record if name not in BESIDE_LOSSES and "/" not in name]
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
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in train),
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
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"kind", "step", "seconds", "samples"} <= record.keys():
        raise ReportError(f"{where} is not a record with kind, step, seconds and samples")
    return with_current_names(record)
