"""Write WebDataset shards: parallel, restartable, with the same bytes in every run, also after a kill.

A shard is one unit of work: `samples_per_shard` captions in the order of the source, skipped ones included. The
assignment of samples to shards therefore depends neither on the number of workers nor on the progress of an earlier
run. A sample is three members of the tar: KEY.jpg (or png, webp), KEY.txt (the caption, UTF-8) and KEY.json
(`image_id`, `name`). An image with several captions is written once per caption. The folder also contains:

- index.json: `{"version": 1, "shards": [{"name", "samples", "bytes", "sha256"}]}`; written last, it marks a complete
  set
- report.json: source, options, counts, and skipped samples with a few names per reason
- ids.txt: IDs of the written images, for `--exclude_ids` of another set
- .prepare/, only while the writer runs: one record per finished shard; a shard is finished once the shard and its
  record are renamed into place
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from eve_ds import limits, storage
from eve_ds.data.caption_text import clean_caption, decode_caption
from eve_ds.data.errors import BadSample, SourceError
from eve_ds.data.formats.unread import refuse_binary
from eve_ds.data.image_check import JPEG_QUALITY, encode_for_shard
from eve_ds.data.importers.candidate import Candidate, LazyCandidate, Skip, Source
from eve_ds.data.sample_names import shard_files, split_name, written_key
from eve_ds.data.tar_headers import Damage, block_reader, scan
from eve_ds.file_lock import lock_file
from eve_ds.printable import excerpt
from eve_ds.reading import parse_json, read_file, read_json
from eve_ds.signals import children_without_signals, held_signals
from eve_ds.storage import is_disk_error

VERSION = 1
"""Version of index.json and report.json."""
PROGRESS_FOLDER = ".prepare"
EXAMPLES_PER_REASON = 5
"""Names of skipped samples to keep for each reason."""
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
POLL_SECONDS = 0.1
"""Longest wait for a shard before signals are looked at."""
TASKS_PER_WORKER = 2
"""Shards that are assigned in advance, per worker; images of compressed archives stay in memory meanwhile."""


EARLIER_QUALITY = 95
"""Quality of the JPEG files of versions without :attr:`WriterOptions.quality`."""


class OutputError(ValueError):
    """Raised for an output folder that cannot be written or has other contents; the message says what to do."""


@dataclass(frozen=True)
class WriterOptions:
    """Options that determine the shards, in addition to the source."""

    samples_per_shard: int = 1000
    """Captions of one shard, skipped ones included; an image with several captions is never split."""
    max_size: int | None = None
    """Limit of an image's shorter side, in pixels; larger images are shrunk and stored as JPEG. None keeps the original
    bytes."""
    limit: int | None = None
    """Number of candidates to use from the start of the source; None: all."""
    exclude_ids: str | None = None
    """Path of a file with one image ID per line; images with such an ID or alias are skipped."""
    unescape_html: bool = False
    """Replace HTML entities of captions by their characters."""
    quality: int = JPEG_QUALITY
    """Quality of the JPEG files of shrunk images, 1 to 100."""

    def describe(self) -> dict[str, Any]:
        """Return the options for JSON, with a digest of the excluded IDs because their file may change.

        `unescape_html` is left out where it is not set, and `quality` where it has no effect or is that of earlier
        versions, so that folders of versions without them can be continued.
        """
        listed = sorted(read_ids(self.exclude_ids))
        digest = hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()
        described = asdict(self) | {"exclude_ids": digest if self.exclude_ids else None}
        left_out = {"unescape_html"} if not self.unescape_html else set()
        left_out |= {"quality"} if self.max_size is None or self.quality == EARLIER_QUALITY else set()
        return {name: value for name, value in described.items() if name not in left_out}


@dataclass
class Skipped:
    """Counts of skipped samples, with a few names per reason."""

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, names: Iterable[str], count: int = 1) -> None:
        """Count skipped samples for a reason."""
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] = (entry["examples"] + [excerpt(name) for name in names])[:EXAMPLES_PER_REASON]

    @property
    def count(self) -> int:
        """Number of skipped samples over all reasons."""
        return sum(entry["count"] for entry in self.reasons.values())


@dataclass(frozen=True)
class ShardTask:
    """Candidates of one shard; `first_index` is the index of the first candidate in the source."""

    number: int
    first_index: int
    candidates: tuple[LazyCandidate, ...]
    skips: tuple[Skip, ...]

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"shard-{self.number:06d}.tar"


@dataclass
class ShardRecord:
    """Result of a task; if `samples` is 0, no file was written."""

    name: str
    candidates: int
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    ids: list[str] = field(default_factory=list)
    """IDs of the written images."""
    excluded: list[str] = field(default_factory=list)
    """Lines of the exclusion file that matched a candidate."""
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> count and examples; see :class:`Skipped`."""


@dataclass(frozen=True)
class Progress:
    """Report of one finished shard to the caller of :func:`write_shards`."""

    record: ShardRecord
    """Record of the shard."""
    kept: bool
    """Whether an earlier run finished the shard."""
    total: int | None
    """Expected number of candidates of the source; None: unknown."""


def write_shards(
    source: Source,
    out: str | Path,
    options: WriterOptions,
    workers: int = 1,
    on_shard: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the shards of a source, or complete the shards of an interrupted call.

    A folder that is already complete is not changed.

    Args:
        source: candidates and their description.
        out: folder to write.
        options: options that determine the shards.
        workers: number of worker processes; 1: this process writes.
        on_shard: called after every finished shard, including shards of an earlier run.

    Returns:
        Content of report.json.

    Raises:
        OutputError: the folder belongs to another source or other options, is complete but damaged, or cannot be
            written.
        SourceError: the source is damaged, or none of its samples can be used.
        OSError: writing failed, for example on a full disk; the same call resumes.
    """
    folder = Path(out)
    plan = json.loads(json.dumps({"version": VERSION, "source": source.description, "options": options.describe()}))
    complete = completed_report(folder, plan)
    if complete is not None:
        shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)  # left by a run killed after it wrote the index
        return complete
    with _claimed(folder, plan):
        try:
            records = sorted(_records(source, folder, options, workers, on_shard), key=lambda record: record.name)
            if not any(record.samples for record in records):
                raise SourceError(f"no sample could be used: {_summary(_merge_skipped(records))}")
        except SourceError:
            _discard(folder)  # another source has another plan, which could not continue these shards
            raise
        report = _finish(folder, plan, records, len(read_ids(options.exclude_ids)))
    return report


def completed_report(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report of a complete folder of this plan; None if the folder is not complete.

    Raises:
        OutputError: the folder is complete for another plan, or a shard does not have the size in the index.
    """
    index_path, report_path = folder / "index.json", folder / "report.json"
    if not index_path.exists():
        return None
    try:
        index, report = (read_json(path) for path in (index_path, report_path))
        _require_same_plan(folder, {key: report[key] for key in plan}, plan)
        entries = [(folder / entry["name"], entry["bytes"]) for entry in index["shards"]]
    except OutputError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{folder} holds an index.json that this command did not write; choose another --out"
        ) from None
    for path, size in entries:
        if not path.is_file() or path.stat().st_size != size:
            raise OutputError(
                f"{path} is missing or does not have the {size} bytes in index.json; remove {folder} and repeat"
            )
    return report


@cache
def read_ids(path: str | None) -> frozenset[str]:
    """Read the IDs of a file, one per line; None gives the empty set.

    Raises:
        SourceError: the file cannot be read, or is of a kind in which no ID would be found: UTF-16, compressed, JSON.
    """
    if path is None:
        return frozenset()
    try:
        text = read_file(path, limits.ANNOTATION_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"cannot read the ids to exclude from {path}: {error.strerror}") from None
    refuse_binary(Path(path))
    if text.lstrip()[:1] in ("[", "{") and _is_json(text):
        raise SourceError(f"the ids to exclude from {path} are JSON: write one id a line, as in ids.txt")
    return frozenset(_one_line(line) for line in text.split("\n")) - {""}


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), list | dict)
    except ValueError:
        return False


def _one_line(image_id: str) -> str:
    """Return an image id in the form of ids.txt, in which ids are compared.

    Whitespace becomes single spaces, and a surrogate that stands for no byte the replacement character. Accents are
    parts of their letters (NFC): macOS writes them apart in names of files.
    """
    return _LONE_SURROGATE.sub("\ufffd", unicodedata.normalize("NFC", " ".join(image_id.split())))


# ------------------------------------------------------------------------------------------------- one shard


def split_into_tasks(source: Iterable[LazyCandidate | Skip], options: WriterOptions) -> Iterator[ShardTask]:
    """Divide a source into shards; candidates that the importer itself skips do not count toward the shard size."""
    candidates: list[LazyCandidate] = []
    skips: list[Skip] = []
    number = first_index = captions = 0
    for item in source:
        if isinstance(item, Skip):
            skips.append(item)
            continue
        candidates.append(item)
        captions += item.num_captions
        at_limit = first_index + len(candidates) == options.limit
        if captions >= options.samples_per_shard or at_limit:
            yield ShardTask(number, first_index, tuple(candidates), tuple(skips))
            number, first_index = number + 1, first_index + len(candidates)
            candidates, skips, captions = [], [], 0
        if at_limit:
            return
    if candidates or skips:
        yield ShardTask(number, first_index, tuple(candidates), tuple(skips))


def write_shard(task: ShardTask, folder: Path, options: WriterOptions) -> ShardRecord:
    """Check and write the samples of one shard, then its record, each by an atomic rename."""
    record = ShardRecord(task.name, len(task.candidates))
    skipped = Skipped(record.skipped)
    for skip in task.skips:
        skipped.add(skip.reason, [skip.name])
    temporary = folder / PROGRESS_FOLDER / f"{task.name}.{os.getpid()}.tmp"
    with temporary.open("w+b") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, candidate in enumerate(task.candidates, start=task.first_index):
                _write_candidate(tar, index, candidate, options, record, skipped)
        file.flush()
        os.fsync(file.fileno())
        record.bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if record.samples:
        temporary.replace(folder / task.name)
    else:
        temporary.unlink()
    _write_atomically(_record_path(folder, task), _dump(asdict(record)))
    return record


def _write_candidate(
    tar: tarfile.TarFile,
    index: int,
    lazy: LazyCandidate,
    options: WriterOptions,
    record: ShardRecord,
    skipped: Skipped,
) -> None:
    try:
        candidate = lazy.resolve()
        _require_not_excluded(candidate, options, record)
        captions = _usable_captions(candidate, options.unescape_html, skipped)
        if not captions:
            return
        image, suffix = encode_for_shard(candidate.image.read(), options.max_size, options.quality)
    except BadSample as bad:
        skipped.add(bad.reason, [lazy.name])
        return
    about = {"image_id": candidate.image_id, "name": candidate.name}
    for number, caption in captions:
        key = written_key(index, None if candidate.num_captions == 1 else number)
        for member, data in ((suffix, image), ("txt", caption), ("json", _dump(about))):
            _add_member(tar, f"{key}.{member}", data)
        record.samples += 1
    record.ids.append(candidate.image_id)


def _require_not_excluded(candidate: Candidate, options: WriterOptions, record: ShardRecord) -> None:
    names = {_one_line(name) for name in (candidate.image_id, *candidate.aliases)}
    matches = read_ids(options.exclude_ids) & names
    if matches:
        record.excluded += sorted(matches)
        raise BadSample("excluded id")


def _usable_captions(candidate: Candidate, unescape_html: bool, skipped: Skipped) -> list[tuple[int, bytes]]:
    """Return usable captions as UTF-8 with their index; each unusable caption is counted as skipped."""
    usable = []
    for number, caption in enumerate(candidate.captions):
        try:
            usable.append((number, decode_caption(caption, unescape_html).encode("utf-8")))
        except BadSample as bad:
            skipped.add(bad.reason, [candidate.name])
    return usable


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A new TarInfo has mtime, uid and gid 0, no owner names and mode 0644: independent of machine and time.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# ------------------------------------------------------------------------------------------------- all shards


def _records(
    source: Source, folder: Path, options: WriterOptions, workers: int, on_shard: Callable[[Progress], None]
) -> Iterator[ShardRecord]:
    """Yield the records of all shards, including those of an earlier run, as they become available."""
    kept: list[ShardRecord] = []

    def unfinished() -> Iterator[ShardTask]:
        for task in split_into_tasks(source, options):
            record = _read_record(folder, task)
            if record is None:
                yield task
            else:
                kept.append(record)
                on_shard(Progress(record, True, source.total))

    for record in _run(unfinished(), folder, options, workers):
        on_shard(Progress(record, False, source.total))
        yield record
    yield from kept


def _run(tasks: Iterator[ShardTask], folder: Path, options: WriterOptions, workers: int) -> Iterator[ShardRecord]:
    if workers == 1:
        yield from (write_shard(task, folder, options) for task in tasks)
        return
    # Spawn instead of fork, so that nothing of the caller (progress bar threads, open files) is inherited.
    with children_without_signals(), held_signals():  # this process handles them
        executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: set[Future[ShardRecord]] = set()
    try:
        for task in tasks:
            with children_without_signals(), held_signals():
                pending.add(executor.submit(write_shard, task, folder, options))
            if len(pending) >= TASKS_PER_WORKER * workers:
                done, pending = _wait(pending)
                yield from (future.result() for future in done)
        while pending:
            done, pending = _wait(pending)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise OutputError(
            "a worker was killed, perhaps for lack of memory; rerun the same command to resume (fewer --workers?)"
        ) from None
    finally:
        with held_signals():
            executor.shutdown(cancel_futures=True)


def _wait(pending: set[Future[ShardRecord]]) -> tuple[set[Future[ShardRecord]], set[Future[ShardRecord]]]:
    """Wait for the first of the shards; a signal is handled between two looks."""
    done: set[Future[ShardRecord]] = set()
    while not done:
        with held_signals():
            done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
    return done, pending


def _start_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent exits: a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finish(folder: Path, plan: dict[str, Any], records: list[ShardRecord], num_listed: int) -> dict[str, Any]:
    written = [record for record in records if record.samples]
    ids = list(dict.fromkeys(image_id for record in written for image_id in record.ids))
    matched = {name for record in records for name in record.excluded}
    report = plan | {
        "shards": len(written),
        "samples": sum(record.samples for record in written),
        "images": len(ids),
        "bytes": sum(record.bytes for record in written),
        "skipped": _merge_skipped(records).reasons,
        "excluded_ids": {"listed": num_listed, "matched": len(matched)},
    }
    shards = [
        {"name": record.name, "samples": record.samples, "bytes": record.bytes, "sha256": record.sha256}
        for record in written
    ]
    lines = "".join(f"{_one_line(name)}\n" for name in ids)
    _write_atomically(folder / "ids.txt", lines.encode(errors="surrogateescape"))
    _write_atomically(folder / "report.json", _dump(report, indent=2))
    _write_atomically(folder / "index.json", _dump({"version": VERSION, "shards": shards}, indent=1))
    shutil.rmtree(folder / PROGRESS_FOLDER)
    return report


def _merge_skipped(records: list[ShardRecord]) -> Skipped:
    merged = Skipped()
    for record in records:
        for reason, entry in record.skipped.items():
            merged.add(reason, entry["examples"], entry["count"])
    return merged


def _summary(skipped: Skipped) -> str:
    parts = [f"{reason}: {entry['count']} (as {entry['examples'][0]})" for reason, entry in skipped.reasons.items()]
    return "; ".join(parts) or "the source is empty"


# ------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Claim the folder for this plan, remove leftovers of a killed run, and lock the folder while the body runs."""
    progress = folder / PROGRESS_FOLDER
    plan_path = progress / "plan.json"
    try:
        if plan_path.exists():
            _require_same_plan(folder, _read_progress(plan_path), plan)
        elif shard_files(folder):
            raise OutputError(f"{folder} holds .tar files that this command did not write; choose another --out")
        progress.mkdir(parents=True, exist_ok=True)
        _write_atomically(plan_path, _dump(plan, indent=2))
        lock = (progress / "lock").open("wb")
    except OSError as error:
        if is_disk_error(error):
            raise
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            lock_file(lock, wait=False, owner="file")
        except BlockingIOError:
            raise OutputError(f"another process is writing to {folder}") from None
        for leftover in (*progress.glob("*.tmp"), *folder.glob("*.tmp")):
            leftover.unlink(missing_ok=True)
        yield


def _discard(folder: Path) -> None:
    for shard in folder.glob("shard-*.tar"):
        shard.unlink()
    shutil.rmtree(folder / PROGRESS_FOLDER)


def _require_same_plan(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    difference = _first_difference(theirs, ours)
    if difference:
        raise OutputError(
            f"{folder} holds the shards of another source or other options ({difference}); "
            "choose another --out or remove it"
        )


def _first_difference(theirs: Any, ours: Any, where: str = "") -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            difference = _first_difference(theirs.get(key), ours.get(key), f"{where}.{key}".lstrip("."))
            if difference:
                return difference
        return None
    return None if theirs == ours else f"{where}: {json.dumps(theirs)} there, {json.dumps(ours)} here"


def _record_path(folder: Path, task: ShardTask) -> Path:
    return folder / PROGRESS_FOLDER / f"{task.name}.json"


def _read_record(folder: Path, task: ShardTask) -> ShardRecord | None:
    try:
        record = ShardRecord(**_read_progress(_record_path(folder, task)))
    except FileNotFoundError:
        return None
    except TypeError:
        raise OutputError(_not_written(_record_path(folder, task), "has other keys")) from None
    path = folder / task.name
    intact = not record.samples or (path.is_file() and path.stat().st_size == record.bytes)
    return record if intact else None


def _read_progress(path: Path) -> Any:
    """Content of a file of an unfinished run."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(_not_written(path, storage.cause(error))) from None


def _not_written(path: Path, problem: str) -> str:
    return f"{path} is no file of this command ({problem}); remove {path.parent}, or choose another --out"


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _dump(tree: Any, indent: int | None = None) -> bytes:
    # ASCII output, because names may contain bytes that are not valid text.
    separators = None if indent else (",", ":")
    return json.dumps(tree, sort_keys=True, indent=indent, separators=separators).encode() + (b"\n" if indent else b"")


# ------------------------------------------------------------------------------------------------- reading back


def read_captions(folder: str | Path) -> Iterator[str]:
    """Yield the captions (`.txt` members, UTF-8) of all shards of a folder, in order of shard name.

    The shards may come from another tool.

    Raises:
        SourceError: a folder without shards, a damaged shard, or a caption that is not UTF-8.
    """
    shards = shard_files(Path(folder))
    if not shards:
        raise SourceError(f"{folder} holds no .tar shards")
    for path in shards:
        try:
            with path.open("rb", buffering=0) as file:
                for text in _texts(file.fileno()):
                    yield clean_caption(text.decode("utf-8"))[: limits.CAPTION_CHARACTERS]
        except (OSError, ValueError) as error:  # ValueError: damage, UnicodeDecodeError
            raise SourceError(f"{path} cannot be read: {error}") from None


def _texts(descriptor: int) -> Iterator[bytes]:
    """Yield the `.txt` members of a tar; raises ValueError for damage and for a member above the cap."""
    for found in scan(block_reader(descriptor), os.fstat(descriptor).st_size):
        if isinstance(found, Damage):
            raise ValueError(f"damaged at byte {found.offset:,}")
        if found.name.endswith(".txt") and split_name(found.name)[0] is not None:
            if found.size > limits.METADATA_BYTES:
                raise ValueError(f"{found.name} has {found.size:,} bytes, more than {limits.METADATA_BYTES:,}")
            yield os.pread(descriptor, found.size, found.end - found.size)
