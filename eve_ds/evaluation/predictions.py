"""Evaluation: all ranks together predict every query exactly once, write each record at once, and compute metrics.

Each rank appends to its own file. A restart with any number of ranks keeps every complete line and predicts the rest.
It also predicts skipped queries again, since their images may be there now. At the end `predictions.jsonl` holds one
line per query in the order of the data, and `metrics.json` is computed from it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eve_ds.config import ConfigError
from eve_ds.distributed import broadcast_object, gather_objects
from eve_ds.tasks.batches import ImageReader, Inference, TaskCollator
from eve_ds.tasks.examples import Example, fingerprint
from eve_ds.tasks.task import Task
from eve_ds.topology import Topology

PREDICTIONS, METRICS, IDENTITY = "predictions.jsonl", "metrics.json", "evaluation.json"
FLUSH_EVERY = 64
"""Number of records between two writes to disk."""


def evaluate(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    collate: TaskCollator,
    *,
    out: Path,
    weights: str,
    batch_size: int,
) -> dict[str, Any]:
    """Predict the queries that `out` lacks, complete the folder and return the metrics; collective over all ranks.

    Args:
        task: task of the model.
        model: the plain model on its device; every rank has the whole model, so that no rank waits for others.
        examples: equal on every rank.
        collate: makes batches for the model.
        out: output folder; predictions of the same model and data that it holds already are kept.
        weights: hash of the model's weights, which identifies them.
        batch_size: examples per forward; predictions do not depend on it.

    Raises:
        ConfigError: `out` holds predictions of another model, data or task, or two examples have the same key.
    """
    queries = task.queries(examples)
    twice = [key for key, count in Counter(queries).items() if count > 1]
    if twice:
        raise ConfigError(f"key '{twice[0]}' belongs to {Counter(queries)[twice[0]]} examples: keys must be unique")
    identity = {"weights": weights, "examples": fingerprint(examples), "task": task.settings()}
    topology = Topology.current()
    rank, world_size = topology.data_rank, topology.data_size
    done, problem = broadcast_object(_begin(out, identity, task) if rank == 0 else (set(), None))
    if problem is not None:
        raise ConfigError(problem)
    todo = [key for key in queries if key not in done][rank::world_size]
    inference = Inference(model.eval(), ImageReader(task.config, training=False), collate, batch_size)
    with _part(out, rank).open("w", encoding="utf-8") as file:
        for number, record in enumerate(task.predict(inference, examples, todo), start=1):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if number % FLUSH_EVERY == 0:
                file.flush()
    gather_objects(None)  # all ranks have written
    metrics = _finish(task, examples, queries, out) if rank == 0 else None
    result = broadcast_object(metrics)
    assert result is not None
    return result


def _part(out: Path, rank: int) -> Path:
    return out / f"predictions.part-{rank:05d}.jsonl"


def _begin(out: Path, identity: dict[str, Any], task: Task) -> tuple[set[str], str | None]:
    """Keys with a prediction in `out`, and the reason why the folder cannot be used, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        problem = _check_identity(out / IDENTITY, identity)
        if problem is not None:
            return set(), problem
        write_json(out / IDENTITY, identity)
        records = _kept(_collect(out), task)
        _write_lines(out / PREDICTIONS, records.values())
        for part in _parts(out):
            part.unlink()
    except OSError as error:
        return set(), f"{error.filename or out} cannot be written: {error.strerror}; name another folder"
    return set(records), None


def _check_identity(file: Path, identity: dict[str, Any]) -> str | None:
    if not file.is_file():
        return None
    before = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in identity.items() if before.get(name) != value]
    if not other:
        return None
    return (
        f"{file.parent} holds predictions of other {' and '.join(other)} ({before.get(other[0])}, now "
        f"{identity[other[0]]}): name another folder, or remove it"
    )


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("predictions.part-*.jsonl"))


def _collect(out: Path) -> dict[str, dict[str, Any]]:
    """Complete lines of all files by key; the last line of a killed writer may be cut off."""
    records = {}
    for file in (out / PREDICTIONS, *_parts(out)):
        if file.is_file():
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                record = json.loads(line)
                records[record["key"]] = record
    return records


def _kept(records: dict[str, dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Records that a restart keeps."""
    answered = {key: record for key, record in records.items() if "skipped" not in record}
    return {} if task.searches and len(answered) < len(records) else answered


def _finish(task: Task, examples: Sequence[Example], queries: list[str], out: Path) -> dict[str, Any]:
    """Merge the files in the order of the data and compute the metrics."""
    records = _collect(out)
    if records.keys() != set(queries):
        raise RuntimeError(f"{out} holds {len(records)} predictions for {len(queries)} queries, which is a bug")
    ordered = {key: records[key] for key in queries}
    _write_lines(out / PREDICTIONS, ordered.values())
    for part in _parts(out):
        part.unlink()
    skipped = Counter(record["skipped"] for record in ordered.values() if "skipped" in record)
    metrics = task.metrics(examples, ordered) | {f"skipped/{reason}": count for reason, count in skipped.items()}
    write_json(out / METRICS, metrics)
    return metrics


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all, so that a later step can trust it."""
    _replace(file, json.dumps(content, indent=1) + "\n")


def _write_lines(file: Path, records: Any) -> None:
    _replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _replace(file: Path, text: str) -> None:
    """Write the whole file or leave it unchanged."""
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def read_predictions(out: Path) -> dict[str, dict[str, Any]]:
    """Records of a finished evaluation by key."""
    return _collect(out)
