"""Resume a run: the newest good checkpoint, and its state back into an engine of any topology."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import engine_tensors, manifest
from eve_ds.checkpoint.files import CheckpointError, PieceReader
from eve_ds.config import Config, ConfigError, parse_written_config
from eve_ds.distributed import broadcast_object, gather_objects
from eve_ds.printable import excerpt
from eve_ds.topology import Topology

PROBES = ("A red Circle, left of 2 BLUE squares.", "naïve  café\t(50%)", "红色的圆", "don't re-do [MASK]")
"""Texts whose token ids tell tokenizers of one vocabulary apart."""


def newest_good(config: Config, named: Path | None = None) -> Path | None:
    """Checkpoint to resume from; collective. Every file is read and compared with its hash.

    Args:
        config: configuration of this run.
        named: a checkpoint, or the folder of a run. None means `train.output_dir`. Of a run the newest good checkpoint
            is taken, with a warning for every newer one that is not good.

    Returns:
        Folder of the checkpoint, or None if the run has no checkpoint.

    Raises:
        ConfigError: the named folder is neither a run with a checkpoint nor a checkpoint, all checkpoints are damaged,
            or the checkpoint holds another model.
    """
    candidates, problem = broadcast_object(_candidates(config.train.output_dir, named))
    if problem is not None:
        raise ConfigError(f"{problem}: name a checkpoint or a run with one, or take auto or none")
    try:
        folder = manifest.first_good(candidates, _problems_over_ranks)
    except CheckpointError as error:
        raise ConfigError(
            f"{error}: no good checkpoint to resume from; restore the files, or name another output folder"
        ) from None
    if folder is not None:
        _check_model(folder, config)
    return folder


def _candidates(output_dir: Path, named: Path | None) -> tuple[list[Path], str | None]:
    """Checkpoints to resume from, best first, and the problem of a named folder that has none."""
    if named is None:
        return manifest.committed(output_dir), None
    if (named / manifest.FOLDER).is_dir():
        found = manifest.committed(named)
        return found, None if found else f"the run {named} to resume from has no finished checkpoint"
    if (named / manifest.MANIFEST).is_file():
        return [named], None
    what = "is a file" if named.is_file() else "does not exist"
    what = f"has no {manifest.MANIFEST}" if named.is_dir() else what
    return [], f"the checkpoint {named} to resume from {what}"


def _problems_over_ranks(folder: Path) -> list[str]:
    topology = Topology.current()
    gathered = gather_objects(manifest.problems(folder, (topology.rank, topology.world_size)))
    return list(dict.fromkeys(problem for problems in gathered for problem in problems))


def _check_model(folder: Path, config: Config) -> None:
    theirs = parse_written_config(manifest.read_json(folder / manifest.CONFIG), str(folder)).model
    for key, now in config.model:
        if (then := getattr(theirs, key)) != now:
            raise ConfigError(
                f"{folder} holds another model than this run's: its model.{key} is {then!r}, this run's is {now!r}; "
                "name a checkpoint of this run"
            )


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Compare the run's tokenizer with the one that a checkpoint holds, wherever either was read from.

    Raises:
        ConfigError: they give a text other token ids.
    """
    file = folder / manifest.TOKENIZER / "tokenizer.json"
    if not file.is_file():
        return
    theirs, ours = Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer
    before, now = theirs.get_vocab(), ours.get_vocab()
    token = next((token for token in sorted(before.keys() | now.keys()) if before.get(token) != now.get(token)), None)
    if token is not None:
        problem = f"the token '{token}' has the id {before.get(token, 'none')} there and {now.get(token, 'none')} here"
    elif _ids(theirs) != _ids(ours):
        problem = "the vocabularies are equal, but texts are split otherwise"
    else:
        return
    raise ConfigError(
        f"{folder} was written with another tokenizer than data.tokenizer ({problem}): restore the tokenizer, or name "
        "another output folder"
    )


def _ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of a few texts that tokenizers normalize and split in different ways."""
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]


def changed_settings(folder: Path, config: Config) -> list[str]:
    """Settings that differ from those of the run that wrote a checkpoint, as `section.key: before -> now`."""
    before = parse_written_config(manifest.read_json(folder / manifest.CONFIG), str(folder))
    then, now = (dict(_flat(settings.model_dump(mode="json"))) for settings in (before, config))
    keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    return [f"{key}: {json.dumps(then.get(key))} -> {json.dumps(now.get(key))}" for key in keys]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_positions(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Step of a checkpoint, and the data positions of all ranks that wrote it, in rank order.

    Raises:
        ConfigError: the files have another form.
    """
    with _form(folder):
        ranks = [manifest.read_json(path) for path in sorted(folder.glob("rank-*.json"))]
        return manifest.read_state(folder)["step"], [rank["position"] for rank in ranks]


def load(engine: DeepSpeedEngine, folder: Path, shapes: dict[str, torch.Size], topology: Topology) -> dict[str, Any]:
    """Fill an engine of any topology from a checkpoint that :func:`newest_good` returned; collective.

    `shapes` maps the names of the plain model's weights to their shapes. Random states are restored if the number of
    data ranks is the same. Returns the counters of the run.

    Raises:
        ConfigError: the checkpoint's tensors do not match the model.
    """
    with _form(folder):
        numbers = manifest.read_state(folder)
        reader = PieceReader(folder)
        engine_tensors.check_tensors(reader, shapes, str(folder))
        engine_tensors.load_pieces(engine, reader, float(numbers["optimizer_steps"]))
        engine_tensors.load_loss_scale(engine, numbers["loss_scale"])
        ranks = sorted(folder.glob("rank-*.json"))
        if len(ranks) == topology.data_size:
            restore_random_states(manifest.read_json(ranks[topology.data_rank])["random"])
        return numbers


@contextmanager
def _form(folder: Path) -> Iterator[None]:
    """Context in which an error about the form of a checkpoint's files becomes ConfigError."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{type(error).__name__}: {excerpt(str(error))}"
        raise ConfigError(f"{folder} holds counters or random states of another form ({problem})") from None


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the result of :func:`random_states`."""
    kind, numbers, gauss = states["python"]
    random.setstate((kind, tuple(numbers), gauss))
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
