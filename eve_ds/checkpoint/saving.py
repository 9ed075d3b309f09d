"""Save a run so that a checkpoint appears whole or not at all.

All ranks write into a hidden folder and flush. When all have, rank 0 adds the manifest, renames the folder and replaces
`latest`. If writing fails on any rank, nothing appears, older checkpoints stay, and the run continues.
"""

from __future__ import annotations

import json
import platform
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import engine_tensors, manifest
from eve_ds.checkpoint.check_batch import check_batch
from eve_ds.checkpoint.files import (
    CheckpointError,
    FileRecord,
    Piece,
    flush_folder,
    tensor_file,
    write_bytes,
    write_pieces,
)
from eve_ds.config import Config
from eve_ds.distributed import broadcast_object, rank_zero
from eve_ds.log import get_logger
from eve_ds.storage import SaveError, reason
from eve_ds.topology import Topology

PACKAGES = ("eve_ds", "torch", "deepspeed", "transformers")


class Content(NamedTuple):
    """Content of a save besides the state of the engine."""

    step: int
    """Number of optimizer updates so far."""
    numbers: dict[str, Any]
    """Counters of the run that JSON can hold; those of rank 0 are saved."""
    position: dict[str, Any]
    """Position of this rank's data loader, in a form that JSON can hold."""
    check_inputs: dict[str, Any] | None
    """A few samples of this rank, as the model takes them. The samples of rank 0 are stored together with the model's
    outputs, so that a reader of the weights can verify that it has the same model. None stores none."""


class Saved(NamedTuple):
    """A published checkpoint."""

    folder: Path
    step: int
    stall_seconds: float
    """Time that training stood still on rank 0."""
    bytes: int
    """Total over all ranks."""


class _Pending:
    """One save from its first byte to its publication; `records` lists this rank's files written so far."""

    def __init__(self, step: int, folder: Path, rank: int) -> None:
        self.step, self.folder, self.rank = step, folder, rank
        self.records: dict[str, FileRecord] = {}
        self.problem: str | None = None
        self.thread: threading.Thread | None = None
        self.stall_seconds = 0.0

    def attempt(self, write: Callable[[], None]) -> None:
        """Call `write` unless a problem occurred before; record any exception, because this may run in a thread."""
        if self.problem is not None:
            return
        try:
            write()
        except OSError as error:
            self.problem = f"rank {self.rank}: {reason(error)}"
        except Exception as error:
            self.problem = f"rank {self.rank}: {type(error).__name__}: {error}"

    @property
    def written(self) -> bool:
        """Whether this rank has finished writing."""
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Saves of one run; all methods except `written` are collective over all ranks.

    Args:
        config: `train.output_dir`, `keep_last`, `keep_every_steps`, `async_save`, `max_failed_saves`.
        tokenizer: stored in every checkpoint.
        group: process group of all ranks for data in host memory.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast, group: dist.ProcessGroup) -> None:
        self.config, self.group = config, group
        self.topology = Topology.of(config.parallel)
        self.tokenizer_files = _tokenizer_files(tokenizer)
        self.root = config.train.output_dir / manifest.FOLDER
        self.failures = 0
        self.pending: _Pending | None = None

    @property
    def written(self) -> bool:
        """Whether a save is pending and this rank has finished its part."""
        return self.pending is not None and self.pending.written

    def begin(self, engine: DeepSpeedEngine, content: Content) -> None:
        """Write this rank's part; with `async_save`, copy it to host memory and let a thread write it."""
        started = time.perf_counter()
        # The token makes the name unique: ranks of a killed run may still write when the next run saves the same step.
        token = broadcast_object(secrets.token_hex(4))
        pending = _Pending(
            content.step, self.root / f".saving-{manifest.name_of(content.step)}-{token}", self.topology.rank
        )
        if rank_zero():
            pending.attempt(lambda: self._make_folder(pending.folder))
        pending.problem = broadcast_object(pending.problem)
        inputs, is_shown = content.check_inputs, self.topology.data_rank == 0
        check = None if inputs is None else check_batch(engine, inputs, is_shown)
        pieces = engine_tensors.pieces_to_write(engine, self.topology)
        small = self._small_files(engine, content, check)
        if self.config.train.async_save:
            pieces = [piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]
            pending.thread = threading.Thread(target=_write, args=(pending, pieces, small), name="checkpoint")
            pending.thread.start()
        else:
            _write(pending, pieces, small)
        pending.stall_seconds = time.perf_counter() - started
        self.pending = pending

    def finish(self) -> Saved | None:
        """Publish the pending save, once every rank has written its part; return None if a rank could not write.

        Raises:
            SaveError: more failures in a row than `train.max_failed_saves`.
        """
        started = time.perf_counter()
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        if pending.thread is not None:
            pending.thread.join()
        gathered: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(gathered, (pending.problem, pending.records), group=self.group)
        # A problem of rank 0 with the folder is known to all ranks.
        problems = list(dict.fromkeys(problem for problem, _ in gathered if problem is not None))
        if rank_zero() and not problems:
            pending.attempt(lambda: self._publish(pending, {k: v for _, own in gathered for k, v in own.items()}))
            problems = [] if pending.problem is None else [pending.problem]
        if rank_zero() and problems:
            shutil.rmtree(pending.folder, ignore_errors=True)
        problems = broadcast_object(problems)
        if problems:
            self._failed(pending, problems)
            return None
        self.failures = 0
        stall = pending.stall_seconds + time.perf_counter() - started
        size = sum(record.bytes for _, records in gathered for record in records.values())
        return Saved(self.root / manifest.name_of(pending.step), pending.step, stall, size)

    def _make_folder(self, folder: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        manifest.remove_leftovers(self.root)
        folder.mkdir()

    def _small_files(self, engine: DeepSpeedEngine, content: Content, check: bytes | None) -> dict[str, bytes]:
        """Name -> content of the files that this rank writes besides its tensors."""
        rank = {"position": content.position, "random": random_states()}
        # Tensor-parallel ranks have equal positions and random numbers, so the first of them writes for all.
        is_first = self.topology.tensor_rank == 0
        small = {f"rank-{self.topology.data_rank:05d}.json": json.dumps(rank).encode()} if is_first else {}
        if rank_zero():
            topology = {
                "world_size": self.topology.world_size,
                "ep_size": self.topology.ep_size,
                "tp_size": self.topology.tp_size,
                "zero_stage": engine.zero_optimization_stage(),
            }
            numbers = {
                "step": content.step,
                "topology": topology,
                "optimizer_steps": engine_tensors.optimizer_steps(engine),
                "loss_scale": engine_tensors.loss_scale_state(engine),
                **content.numbers,
            }
            small[manifest.STATE] = json.dumps(numbers, indent=1).encode()
            small[manifest.CONFIG] = self.config.model_dump_json(indent=2).encode()
            small |= self.tokenizer_files | ({} if check is None else {manifest.CHECK_BATCH: check})
        return small

    def _publish(self, pending: _Pending, records: dict[str, FileRecord]) -> None:
        numbers = manifest.read_json(pending.folder / manifest.STATE)
        content = {
            **{name: numbers[name] for name in ("step", "samples", "topology")},
            "versions": {name: manifest.installed_version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        manifest.write_manifest(pending.folder, content, records)
        if unseen := manifest.problems(pending.folder, hashes=False):
            raise CheckpointError(f"{'; '.join(unseen)}: train.output_dir must be one folder for all ranks")
        manifest.publish(self.root, pending.folder.name, manifest.name_of(pending.step))
        train = self.config.train
        try:
            manifest.remove_leftovers(self.root)
            manifest.retire(train.output_dir, train.keep_last, train.keep_every_steps)
        except OSError as error:  # the new checkpoint is published, so the save has succeeded
            get_logger().warning("old checkpoints cannot be removed: %s", error)

    def _failed(self, pending: _Pending, problems: list[str]) -> None:
        self.failures += 1
        allowed = self.config.train.max_failed_saves
        message = (
            f"the checkpoint of step {pending.step} was not saved ({'; '.join(problems)}); older checkpoints are "
            f"unchanged. Failures in a row: {self.failures}, limit train.max_failed_saves ({allowed}). Free space or "
            f"change permissions of {self.root}"
        )
        if self.failures > allowed:
            raise SaveError(message)
        if rank_zero():
            get_logger().warning("%s", message)


def _write(pending: _Pending, pieces: list[Piece], small: dict[str, bytes]) -> None:
    """Write this rank's files."""

    def write() -> None:
        name = tensor_file(pending.rank)
        pending.records[name] = write_pieces(pending.folder / name, pieces)
        for name, content in small.items():
            (pending.folder / name).parent.mkdir(exist_ok=True)
            pending.records[name] = write_bytes(pending.folder / name, content)
        for folder in {(pending.folder / name).parent for name in small}:
            flush_folder(folder)

    pending.attempt(write)


def _tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """Name in a checkpoint -> content, for each file of the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f"{manifest.TOKENIZER}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}


def random_states() -> dict[str, Any]:
    """States of the default generators of Python, numpy, torch and the accelerator, in a form that JSON can hold."""
    states = {"torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    kind, key, *rest = np.random.get_state()
    return states | {"python": random.getstate(), "numpy": [kind, np.asarray(key).tolist(), *rest]}
