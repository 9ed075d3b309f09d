"""Output folder of a run: lock, ownership check, configuration file."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Any, TextIO

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.output_folder import enclosing_checkpoint
from eve_ds.checkpoint.weights import INDEX, WEIGHTS
from eve_ds.config import Config, ConfigError, parse_written_config
from eve_ds.file_lock import lock_file
from eve_ds.log import get_logger
from eve_ds.storage import replace_file
from eve_ds.training.job import Resume

CONFIG = "config.json"
"""Name of the file that claims an output folder for a run."""

IDENTITY = ("model", "masking", "data", "loss", "task")
"""Sections of the configuration that, like `train.seed`, must stay the same within one output folder."""

MUTABLE_KEYS = {"data": {"num_workers", "max_bad_share", "image_decoder", "remote", "cache_dir", "cache_bytes"}}
"""Keys of the sections in :data:`IDENTITY` that may change."""

LOCATIONS = ("tokenizer", "shards", "annotations", "images")
"""Keys in these sections, at any depth, that say where data lies. They may change once a checkpoint exists: resuming
compares the tokenizer, the shards and the examples themselves."""


class FolderLock:
    """File lock that allows one run at a time to write into a folder; the system releases it with the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Acquire the lock; raises ConfigError if another process holds it."""
        file = self.path.open("a+", encoding="utf-8")
        try:
            lock_file(file, wait=False, owner="process")
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"train.output_dir ({self.path.parent}) is being written by another run ({owner}): wait until it ends, "
                "or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def check_output_dir(config: Config, resume: Resume) -> None:
    """Create the output folder, or check that it is writable and belongs to this run.

    Raises:
        ConfigError: the folder or its folder of checkpoints cannot be written, it is a part of a run or an export,
            holds another run, or holds a run although `resume` is `none`.
    """
    folder = config.train.output_dir
    _refuse_results(folder)
    checkpoints = folder / manifest.FOLDER
    _check_writable(folder, create=True)
    if os.path.lexists(checkpoints):  # a link to another disk, perhaps
        _check_writable(checkpoints, create=False)
    if not (folder / CONFIG).is_file():
        return
    if resume == "none":
        raise ConfigError(f"train.output_dir ({folder}) holds a run: use --resume auto, or name another folder")
    written, tree = _written_config(folder)
    if tree is None:
        return
    before = parse_written_config(tree, str(written)).model_dump(mode="json")  # adds fields newer than the run
    now = config.model_dump(mode="json")
    difference = _difference(_identity(before), _identity(now))
    if difference is not None and manifest.committed(folder):
        difference = _difference(_identity(_without_locations(before)), _identity(_without_locations(now)))
    if difference is not None:
        key, then, now = difference
        raise ConfigError(
            f"train.output_dir ({folder}) is the folder of another run: its {key} is {then!r}, this run's is {now!r}; "
            "name another folder"
        )


def _refuse_results(folder: Path) -> None:
    """Raise ConfigError if the files of a run in `folder` would replace or damage those of an earlier result."""
    inside, checkpoint = Path(os.path.realpath(folder)), enclosing_checkpoint(folder)
    if checkpoint is not None:
        problem, run = f"lies in the checkpoint {checkpoint}", checkpoint.parent.parent
    else:
        problem, run = "is the folder of the checkpoints of a run", inside.parent
    if checkpoint is not None or (inside.name == manifest.FOLDER and manifest.committed(run)):
        raise ConfigError(
            f"train.output_dir ({folder}) {problem}: name the run ({run}) to resume it, or another folder"
        )
    weights = next((name for name in (WEIGHTS, INDEX) if (inside / name).is_file()), None)
    if weights is not None:
        raise ConfigError(
            f"train.output_dir ({folder}) holds an exported model ({weights}): name another folder, and the model as "
            "--init to start from its weights"
        )


def _check_writable(folder: Path, create: bool) -> None:
    """Raise ConfigError if no file can be written into a folder, which is created first if `create`."""
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permission bits miss root, quotas and read-only mounts
    except OSError as error:
        raise ConfigError(
            f"train.output_dir ({folder}) cannot be written: {error.strerror}; name another folder or change its "
            "permissions"
        ) from None


def _written_config(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Read the configuration that the run wrote, or a checkpoint's copy of it if a crash of the machine damaged it.

    Returns:
        The file and its content; None instead of the content of an empty file in a folder without checkpoints, which
        claims nothing.

    Raises:
        ConfigError: neither the file nor a copy can be read.
    """
    written, problems = folder / CONFIG, []
    for file in (written, *(checkpoint / manifest.CONFIG for checkpoint in manifest.committed(folder))):
        try:
            tree = manifest.read_json(file)
        except CheckpointError as error:
            problems.append(str(error).removesuffix(": take another checkpoint"))
            continue
        if problems:
            get_logger().warning("%s; going on with %s", problems[0], file)
        return file, tree
    if len(problems) == 1 and written.stat().st_size == 0:
        get_logger().warning("%s is empty and the folder holds no checkpoint: starting a new run in it", written)
        return written, None
    raise ConfigError(f"{problems[0]}, and no checkpoint has a copy: name another folder, or remove this one")


def _identity(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run, by dotted key."""
    identity = {"train.seed": tree.get("train", {}).get("seed")}
    for section in IDENTITY:
        identity |= {
            f"{section}.{key}": value
            for key, value in (tree.get(section) or {}).items()
            if key not in MUTABLE_KEYS.get(section, ())
        }
    return identity


def _without_locations(tree: Any) -> Any:
    """Return settings without :data:`LOCATIONS`."""
    if isinstance(tree, list):
        return [_without_locations(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _without_locations(value) for key, value in tree.items() if key not in LOCATIONS}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key with different values, and both values; None if all values are equal."""
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def write_config(config: Config) -> None:
    """Write the configuration into the output folder, which claims the folder for the run; keep a file that has it.

    Raises:
        OSError: writing failed; an earlier file is unchanged.
    """
    file, text = config.train.output_dir / CONFIG, config.model_dump_json(indent=2)
    if not file.is_file() or file.read_bytes() != text.encode():
        replace_file(file, text)
