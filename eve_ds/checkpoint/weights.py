"""Initial weights for another run, from an exported folder, a checkpoint, or the newest good checkpoint of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import CheckpointError, PieceReader, tensor_problems
from eve_ds.printable import excerpt
from eve_ds.reading import read_json
from eve_ds.storage import reason

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_PART = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
"""Names of files that an index may name."""


def find_checkpoint(path: Path) -> Path:
    """Checkpoint folder `path`, or the newest good checkpoint if `path` is a run; every file is verified.

    Raises:
        CheckpointError: `path` is neither a run nor a checkpoint, or holds no checkpoint, or no good one.
    """
    if (path / manifest.MANIFEST).is_file():
        folders = [path]
    elif (path / manifest.FOLDER).is_dir():
        folders = manifest.committed(path)
    else:
        problem = f"is neither a run (no folder {manifest.FOLDER}) nor a checkpoint (no {manifest.MANIFEST})"
        raise CheckpointError(f"{path} {problem if path.exists() else 'does not exist'}: name a run or a checkpoint")
    found = manifest.first_good(folders)
    if found is None:
        raise CheckpointError(f"{path} holds no finished checkpoint: train until one is saved")
    return found


def export_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of an exported folder, which has one file or several with an index; empty for other folders.

    Raises:
        CheckpointError: files or index cannot be read.
    """
    try:
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX)["weight_map"]
            return {name: folder / _own_name(file) for name, file in weight_map.items()}
        if not (folder / WEIGHTS).is_file():
            return {}
        with safe_open(folder / WEIGHTS, "pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} cannot be read ({excerpt(reason(error))}): export it again") from None


def _own_name(file: Any) -> str:
    """Name of a file of weights beside the index that names it."""
    if not isinstance(file, str) or not _PART.fullmatch(file):
        raise ValueError(f"{INDEX} names {file!r}, which is no .safetensors file beside it")
    return file


def weight_reader(source: Path, shapes: dict[str, torch.Size]) -> Callable[[str], Tensor]:
    """Function from a tensor's name to the tensor; each call reads only that tensor.

    Args:
        source: exported folder, checkpoint or run.
        shapes: shapes of the model's tensors; the source must hold exactly these.

    Raises:
        CheckpointError: `source` is none of the three, or holds other tensors than the model; the message names them.
    """
    files = export_files(source)
    if not files:
        return checkpoint_reader(find_checkpoint(source), shapes)
    _compare({name: _shape(file, name) for name, file in files.items()}, shapes, source)

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    return read


def checkpoint_reader(folder: Path, shapes: dict[str, torch.Size]) -> Callable[[str], Tensor]:
    """Same for a verified checkpoint folder; returns fp32 masters."""
    reader = PieceReader(folder)
    found = {name: torch.Size([reader.numel("master", name)]) for name in reader.names("master")}
    # Pieces are flat, so a tensor with the same number of elements takes the model's shape.
    fitting = {name: shapes[name] for name, size in found.items() if name in shapes and size[0] == shapes[name].numel()}
    _compare(found | fitting, shapes, folder)
    return lambda name: reader.read("master", name).view(shapes[name])


def _shape(file: Path, name: str) -> torch.Size:
    try:
        if not file.is_file():  # safe_open would wait for a writer of a pipe
            raise FileNotFoundError(f"{file.name} is missing or no regular file")
        with safe_open(file, "pt") as opened:
            return torch.Size(opened.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} does not hold {name} ({error}): export it again") from None


def _compare(found: dict[str, torch.Size], shapes: dict[str, torch.Size], where: Path) -> None:
    problems = tensor_problems(found, shapes)
    if problems:
        raise CheckpointError(
            f"{where} {'; '.join(problems)}: these are the weights of another model than the config's"
        )
