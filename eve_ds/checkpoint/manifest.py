"""Checkpoint folders: which are good, which is the newest, which may be deleted. Works on files only.

run/checkpoints/step-00000500/manifest.json    content, with sizes and hashes; written last
                             /state.json       step, topology, counters
                             /config.json, tokenizer/, check_batch.safetensors
                             /tensors-*.safetensors    see :mod:`eve_ds.checkpoint.files`
                             /rank-*.json      data position and random states of each rank
               /latest                         name of the newest checkpoint
               /.saving-*, .deleting-*         leftovers of a killed process; ignored, and removed by the next save
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from eve_ds import limits, reading
from eve_ds.checkpoint.files import CheckpointError, FileRecord, flush_folder, listed, record_of, write_bytes
from eve_ds.distributed import rank_zero
from eve_ds.log import get_logger
from eve_ds.printable import excerpt

FOLDER, LATEST = "checkpoints", "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
CHECK_BATCH = "check_batch.safetensors"
FORMAT = 1
MOST_NAME = 4096
"""Characters of the path of a file in a checkpoint; no system takes more."""
_NAME = re.compile(r"step-([0-9]{8,18})")


def name_of(step: int) -> str:
    """Folder name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def installed_version(package: str) -> str:
    """Version of a package, or `absent`: eve_ds is not installed when it runs from a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, FileRecord]) -> None:
    """Write the list of a folder's files (path in it -> record); the last step before the folder is published."""
    records = {name: record._asdict() for name, record in sorted(files.items())}
    manifest = {"format": FORMAT, **content, "files": records}
    write_bytes(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    flush_folder(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; raises CheckpointError if the file is anything else."""
    try:
        value = reading.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is incomplete, it lacks {path.name}: take another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): take another checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): take another checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, not a {type(value).__name__}: take another checkpoint")
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """Read step and counters of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or a value that every program needs is of another type.
    """
    state = read_json(folder / STATE)
    for key, absent in (("step", None), ("samples", 0)):
        value = state.get(key, absent)
        if type(value) is not int or not 0 <= value < 2**63:
            problem = f"{key} ({excerpt(repr(value))}), which must be a whole number"
            raise CheckpointError(f"{folder / STATE} has {problem}: take another checkpoint")
    if not isinstance(state.get("topology", {}), dict) or not isinstance(state.get("seconds", 0), int | float):
        raise CheckpointError(f"{folder / STATE} has a topology or seconds of another type: take another checkpoint")
    return state


def problems(folder: Path, share: tuple[int, int] = (0, 1), hashes: bool = True) -> list[str]:
    """Problems of a checkpoint, one line each; empty for a good checkpoint.

    Args:
        folder: folder of the checkpoint.
        share: (i, n) checks every n-th file starting at file i, so that n readers together check the whole folder.
        hashes: True reads the files and compares hashes; False compares sizes only.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            return [f"{MANIFEST} has format {manifest.get('format')}, only {FORMAT} can be read"]
        records = _records(manifest)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name in sorted(records)[share[0] :: share[1]]:
        problem = _file_problem(folder, name, records[name], hashes)
        found += [f"{name} {problem}"] if problem else []
    if share[0] == 0:
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not _is_folder(path)} - {MANIFEST}
        surplus = present - records.keys()
        found += [f"{listed(surplus)} not in {MANIFEST}"] if surplus else []
    return found


def _records(manifest: dict[str, Any]) -> dict[str, FileRecord]:
    """Files of a manifest by their path in the folder; raises CheckpointError if it is not of this form."""
    try:
        records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is not a list of files with their sizes and hashes") from None
    for name, record in records.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name or len(name) > MOST_NAME:
            raise CheckpointError(f"{MANIFEST} names '{excerpt(name)}', which is no file inside the folder")
        if type(record.bytes) is not int or record.bytes < 0 or not isinstance(record.sha256, str):
            raise CheckpointError(f"{MANIFEST} has no size in bytes, or no hash, of {excerpt(name)}")
    return records


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def first_good(folders: Sequence[Path], problems_of: Callable[[Path], list[str]] = problems) -> Path | None:
    """Return the first good checkpoint, or None if none is given. Rank 0 warns of each damaged one before it.

    Args:
        folders: checkpoints, usually those of :func:`committed`.
        problems_of: returns the problems of a checkpoint, such as :func:`problems`.

    Raises:
        CheckpointError: no checkpoint is good.
    """
    complaints: list[str] = []
    for folder in folders:
        found = problems_of(folder)
        if not found:
            for complaint in complaints if rank_zero() else []:
                get_logger().warning("%s; going back to %s", complaint, folder.name)
            return folder
        complaints.append(f"checkpoint {folder} is damaged: {'; '.join(found)}")
    if complaints:
        raise CheckpointError("; ".join(complaints))
    return None


def _file_problem(folder: Path, name: str, record: FileRecord, hashes: bool) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return "is no regular file" if os.path.lexists(path) else "is missing"
        if not path.resolve().is_relative_to(folder.resolve()):
            return "is a symbolic link out of the folder (cp -rL makes a copy without links)"
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size:,} bytes, {record.bytes:,} were written"
        if hashes and record_of(path) != record:
            return "has other content than was written (sha256 differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def step_of(folder: Path) -> int | None:
    """Step in the name of a checkpoint folder; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed(run: Path) -> list[Path]:
    """Published checkpoints of a run, newest first.

    The newest is the one that `latest` names, because a run may have been resumed from an earlier step. File times and
    clocks are ignored.
    """
    root = run / FOLDER
    if not root.is_dir():
        return []
    steps = {path: step for path in root.iterdir() if path.is_dir() and (step := step_of(path)) is not None}
    ordered = sorted(steps, key=lambda path: steps[path], reverse=True)
    pointer = root / LATEST
    try:
        newest = reading.read_file(pointer, limits.POINTER_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ordered
    last = step_of(Path(newest))
    if last is None:
        return ordered
    older = [path for path in ordered if steps[path] <= last]
    return older + [path for path in ordered if steps[path] > last]


def publish(root: Path, hidden: str, name: str) -> None:
    """Give a complete folder its final name, then point `latest` at it; each step is atomic."""
    if (root / name).exists():  # a run resumed from an earlier step saves this step again
        (root / name).rename(root / f".deleting-{name}")
    (root / hidden).rename(root / name)
    flush_folder(root)
    pointer = root / f".{LATEST}"
    write_bytes(pointer, f"{name}\n".encode())
    os.replace(pointer, root / LATEST)
    flush_folder(root)


def remove_leftovers(root: Path) -> None:
    """Remove leftovers of killed processes: folders that were being written or deleted."""
    for pattern in (".saving-*", ".deleting-*"):
        for leftover in root.glob(pattern):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder with its content, or a link or file; what a link leads to is left alone."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def retire(run: Path, keep_last: int | None, keep_every_steps: int | None) -> list[str]:
    """Delete checkpoints beyond the newest `keep_last` (None keeps all); return the names of deleted checkpoints.

    Checkpoints of every `keep_every_steps`-th step stay. Nothing is deleted if the newest checkpoint has lost a file or
    bytes. A folder is renamed before it is emptied, so that a half-deleted folder never counts as a checkpoint.
    """
    if keep_last is None:
        return []
    folders = committed(run)
    if not folders or problems(folders[0], hashes=False):
        return []
    gone = []
    for folder in folders[keep_last:]:
        if keep_every_steps and (step_of(folder) or 0) % keep_every_steps == 0:
            continue
        hidden = folder.with_name(f".deleting-{folder.name}")
        folder.rename(hidden)
        remove(hidden)
        gone.append(folder.name)
    return gone
