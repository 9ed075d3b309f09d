"""Read tensors from files of other programs, without running code that a pickle may contain."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eve_ds import limits
from eve_ds.checkpoint.files import listed
from eve_ds.export.pickle_size import check_pickle
from eve_ds.printable import excerpt

TORCH_SUFFIXES = {".pth", ".pt", ".th", ".bin", ".ckpt"}
"""Suffixes of files from `torch.save`, in any case of letters."""
_LEGACY_PICKLES = 5
"""Pickles before the values in a file of torch.save before version 1.6: mark, version, system, tensors, their keys."""
WRAPPERS = ("model", "state_dict", "module")
"""Keys that training code uses for weights next to other state; `module` is the key of DeepSpeed."""
WRAPPED_NAMES = ("module.", "_orig_mod.")
"""Starts of all names in the state of a model that DistributedDataParallel or torch.compile wraps."""


class WeightFileError(ValueError):
    """Raised for a weight file that cannot be used; the message names the file and the tensors with problems."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read name -> tensor, on the CPU in the precision of the file, which may stay mapped into memory.

    The file is a .safetensors, or a file of torch.save (TORCH_SUFFIXES) with a dictionary of tensors, either directly
    or under the key `model`, `state_dict` or `module`. Names lose WRAPPED_NAMES. Pickles are read only by
    torch.load(weights_only=True): a pickle that refers to anything except tensors and plain data is refused, and
    nothing that it refers to is called.

    Raises:
        WeightFileError: the file does not exist, is of another kind, or has values that are not dense tensors.
    """
    if not file.is_file():
        raise WeightFileError(
            f"{file} {'is not a file' if file.exists() else 'does not exist'}: name a file of weights"
        )
    if file.suffix.lower() == ".safetensors":
        return _without_wrappers(_read_safetensors(file))
    if file.suffix.lower() not in TORCH_SUFFIXES:
        known = ", ".join([*sorted(TORCH_SUFFIXES), ".safetensors"])
        raise WeightFileError(f"{file} has the suffix '{file.suffix}': only files named {known} are read")
    state = _read_pickle(file)
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise WeightFileError(f"{file} holds no dictionary of tensors, neither at the top level nor under {WRAPPERS}")
    others = [str(name) for name, value in state.items() if not isinstance(name, str) or not _is_dense(value)]
    if others:
        raise WeightFileError(f"{file} holds {listed(others)}, not a dense tensor: give a file of tensors alone")
    return _without_wrappers({name: tensor.detach() for name, tensor in state.items()})


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the starts of WRAPPED_NAMES that all of them have, in any order."""
    while tensors and (
        start := next((start for start in WRAPPED_NAMES if all(name.startswith(start) for name in tensors)), None)
    ):
        tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items()}
    return tensors


def _is_dense(value: Any) -> bool:
    """Whether a value is a tensor in memory that holds each of its elements, not a small one that is repeated."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:  # the latter: dtypes torch lacks
        raise WeightFileError(f"{file} cannot be read ({_first_line(error)}): it may be damaged") from None


def _read_pickle(file: Path) -> Any:
    is_zip = zipfile.is_zipfile(file)
    if not is_zip and not _is_legacy(file):
        raise WeightFileError(f"{file} is not a file that torch.save wrote, or not all of it")
    if is_zip:
        _refuse_compressed(file)
    try:
        _check_pickles(file, is_zip)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"refers to {name[1]}, which could run code" if name else "holds more than tensors, or is damaged"
        raise WeightFileError(f"{file} {what}: give a file of tensors alone, such as .safetensors") from None
    except Exception as error:  # a damaged pickle can raise any exception
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise WeightFileError(f"{file} cannot be read ({reason}): it may be damaged") from None


def _check_pickles(file: Path, is_zip: bool) -> None:
    """Check the pickle in a file of torch.save, or all of those before the values in a former one."""
    if not is_zip:
        with file.open("rb") as opened:
            for _ in range(_LEGACY_PICKLES):
                check_pickle(opened)
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".pkl"):
                if member.file_size > limits.PICKLE_BYTES:
                    raise ValueError(f"its pickle has {member.file_size:,} bytes, more than {limits.PICKLE_BYTES:,}")
                with archive.open(member) as opened:
                    check_pickle(opened)


def _refuse_compressed(file: Path) -> None:
    """Refuse an archive whose members take more bytes than it has; torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise WeightFileError(f"{file} cannot be read ({_first_line(error)}): it may be damaged") from None
    if is_compressed or unpacked > file.stat().st_size:
        raise WeightFileError(f"{file} is compressed ({unpacked:,} bytes unpacked), which torch.save never does")


def _is_legacy(file: Path) -> bool:
    """Whether a file starts like the files of torch.save before version 1.6."""
    start = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
    with file.open("rb") as opened:
        return opened.read(len(start)) == start


def _first_line(error: Exception) -> str:
    return excerpt(str(error).partition("\n")[0])
