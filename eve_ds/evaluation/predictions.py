"""Evaluation: all ranks together predict every query exactly once, write each record at once, and compute metrics.

Each rank appends to its own file. A restart with any number of ranks keeps every complete line and predicts the rest.
It also predicts skipped queries again, since their images may be there now. At the end `predictions.jsonl` holds one
line per query in the order of the data, and `metrics.json` is computed from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from eve_ds.checkpoint.output_folder import refuse_checkpoint
from eve_ds.config import ConfigError
from eve_ds.distributed import broadcast_object
from eve_ds.file_lock import lock_file
from eve_ds.reading import parse_json, read_json, read_lines
from eve_ds.storage import cause, is_disk_error, replace_file
from eve_ds.tasks.batches import ImageReader, Inference, TaskCollator
from eve_ds.tasks.examples import Example, fingerprint, image_digests
from eve_ds.tasks.task import Record, Task
from eve_ds.together import on_every_rank, on_rank_zero
from eve_ds.topology import Topology

PREDICTIONS, METRICS, IDENTITY, LOCK = "predictions.jsonl", "metrics.json", "evaluation.json", ".lock"
IMAGES = "images"
"""Key of an identity with the digests of images; folders of earlier versions have none."""
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
        ConfigError: `out` cannot be used, another evaluation writes to it, it holds predictions of another model, data
            or task, or two examples have the same key.
        SaveError: the disk takes no more predictions; a restart keeps those that were written.
    """
    with ExitStack() as held:
        on_rank_zero(lambda: _lock(out, held))
        return _evaluate(task, model, examples, collate, out=out, weights=weights, batch_size=batch_size)


def _evaluate(
    task: Task,
    model: nn.Module,
    examples: Sequence[Example],
    collate: TaskCollator,
    *,
    out: Path,
    weights: str,
    batch_size: int,
) -> dict[str, Any]:
    """Do the work of :func:`evaluate` in a folder that no other evaluation writes to."""
    queries = task.queries(examples)
    twice = [key for key, count in Counter(queries).items() if count > 1]
    if twice:
        raise ConfigError(f"key '{twice[0]}' belongs to {Counter(queries)[twice[0]]} examples: keys must be unique")
    identity = {"weights": weights, "examples": fingerprint(examples), "task": task.settings()}
    topology = Topology.current()
    rank, world_size = topology.data_rank, topology.data_size
    done: set[str] = set()
    on_rank_zero(lambda: done.update(_begin(out, identity | {IMAGES: image_digests(examples)}, task)))
    done = broadcast_object(done)
    todo = [key for key in queries if key not in done][rank::world_size]
    inference = Inference(model.eval(), ImageReader(task.config, training=False), collate, batch_size)
    with _PartWriter(_part(out, rank)) as writer:
        for record in task.predict(inference, examples, todo):
            writer.write(record)
    on_every_rank(writer.check)
    metrics: dict[str, Any] = {}
    on_rank_zero(lambda: metrics.update(_finish(task, examples, queries, out)))
    return broadcast_object(metrics)


def _part(out: Path, rank: int) -> Path:
    return out / f"predictions.part-{rank:05d}.jsonl"


class _PartWriter:
    """Writes the records of one rank; after an error of the disk it takes further records without writing them.

    The rank goes on predicting, because other ranks may wait for it in a collective of the task.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, 0
        self._error: OSError | None = None
        self._file: TextIO | None = None

    def __enter__(self) -> _PartWriter:
        self._attempt(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._keep_error(self._file.close)

    def write(self, record: Record) -> None:
        """Append one record."""
        self._attempt(lambda: self._append(json.dumps(record, ensure_ascii=False) + "\n"))

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise self._error

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._error is None:
            self._keep_error(action)

    def _keep_error(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            error.filename = error.filename or str(self._path)
            self._error = self._error or error

    def _open(self) -> None:
        self._file = self._path.open("w", encoding="utf-8")

    def _append(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line)
        self._lines += 1
        if self._lines % FLUSH_EVERY == 0:
            self._file.flush()


def _lock(out: Path, held: ExitStack) -> None:
    """Create and lock the folder, for one evaluation at a time; the lock ends with `held`.

    Raises:
        ConfigError: the folder lies in a checkpoint, cannot be written, or another evaluation has locked it.
        OSError: the disk is full or broken.
    """
    refuse_checkpoint(out, ConfigError)
    with _writable(out):
        out.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((out / LOCK).open("ab"))
    try:
        lock_file(file, wait=False, owner="process")
    except BlockingIOError:
        raise ConfigError(
            f"{out} is being written by another evaluation: wait until it ends, or name another folder"
        ) from None


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Turn the error of a folder that cannot be written into a ConfigError; errors of the disk pass."""
    try:
        yield
    except OSError as error:
        if is_disk_error(error):
            raise
        raise ConfigError(f"{error.filename or out} cannot be written: {error.strerror}; name another folder") from None


def _begin(out: Path, identity: dict[str, Any], task: Task) -> set[str]:
    """Claim the folder for these predictions; return the keys that need none any more.

    Raises:
        ConfigError: the folder cannot be used, or holds other predictions.
        OSError: the disk is full or broken.
    """
    with _writable(out):
        _check_identity(out / IDENTITY, identity)
        write_json(out / IDENTITY, identity)
        records = _kept(_collect(out), task)
        _write_lines(out / PREDICTIONS, records.values())
        for part in _parts(out):
            part.unlink()
    return set(records)


def _check_identity(file: Path, identity: dict[str, Any]) -> None:
    if not file.is_file():
        return
    try:
        before = read_json(file)
        if not isinstance(before, dict):
            raise ValueError(f"a {type(before).__name__}, not an object")
    except (OSError, ValueError) as error:
        problem = f"{file} cannot be read ({cause(error)})"
        raise ConfigError(f"{problem}: remove {file.parent}, or name another folder") from None
    other = [name for name, value in identity.items() if name != IMAGES and before.get(name) != value]
    if other:
        raise ConfigError(
            f"{file.parent} holds predictions of other {' and '.join(other)} ({before.get(other[0])}, now "
            f"{identity[other[0]]}): name another folder, or remove it"
        )
    saved, now = before.get(IMAGES), identity[IMAGES]
    changed = [name for name in now if isinstance(saved, dict) and saved.get(name, now[name]) != now[name]]
    if changed:
        raise ConfigError(
            f"{file.parent} holds predictions of other images ({changed[-1]} differs): name another folder, or "
            "remove it"
        )


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("predictions.part-*.jsonl"))


def _collect(out: Path) -> dict[str, dict[str, Any]]:
    """Complete lines of all files by key; the last line of a killed writer may be cut off."""
    records = {}
    for file in (out / PREDICTIONS, *_parts(out)):
        if file.is_file():
            for number, line in enumerate(_whole_lines(file), start=1):
                record = _record(line, f"line {number} of {file}")
                records[record["key"]] = record
    return records


def _whole_lines(file: Path) -> list[str]:
    try:
        return read_lines(file)[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({cause(error)}): remove the file to predict everything again"
        ) from None


def _record(line: str, where: str) -> Record:
    try:
        record = parse_json(line)
        if not (isinstance(record, dict) and isinstance(record.get("key"), str)):
            raise ValueError("no object with a `key`")
    except ValueError as error:
        raise ConfigError(f"{where} is no prediction ({error}): remove the file to predict everything again") from None
    return record


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
    replace_file(file, json.dumps(content, indent=1) + "\n")


def _write_lines(file: Path, records: Any) -> None:
    replace_file(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_predictions(out: Path) -> dict[str, dict[str, Any]]:
    """Records of a finished evaluation by key."""
    return _collect(out)
