"""Tensor files of a checkpoint: flat pieces of named tensors in safetensors files, so that no pickle is ever read.

A piece is stored as `{kind}/{plain name}/{start}` and holds elements of that tensor from `start` on. A piece of a
tensor-parallel shard is stored as `{kind}/{plain name}/{start}/{offset}/{run}/{stride}/{number}`: the shard is `number`
runs of `run` elements of the tensor, `stride` apart, from `offset` on, and the piece holds elements of the shard from
`start` on. A reader need not know which rank wrote a piece or how that rank's optimizer was partitioned: the pieces of
all files together make up the tensors.

Files are written directly from the tensors' memory and hashed on the way; ranges are read without mapping the file.
Both keep memory use at one piece. safetensors' own writer copies all tensors first, and its reader maps the whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eve_ds import limits
from eve_ds.model.shards import Runs
from eve_ds.printable import excerpt, printable
from eve_ds.reading import parse_json, read_file
from eve_ds.storage import cause

PATTERN = "tensors-*.safetensors"
KINDS = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weight and the two moments of Adam."""
SHOWN = 3
"""Number of names that an error lists before it counts the rest."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DIGITS = 18
"""Digits of the place of a piece; a tensor of more elements does not exist."""


class CheckpointError(ValueError):
    """A folder is not a checkpoint, or is incomplete or contradictory; the message names the problem."""


class Piece(NamedTuple):
    """Elements `start` to `start + tensor.numel()` of one tensor or of a shard of it, in row-major order."""

    kind: str
    name: str
    start: int
    tensor: Tensor
    """Flat, on any device."""
    shard: Runs | None = None
    """Elements of the tensor that the shard holds; None: all."""

    @property
    def key(self) -> str:
        """Name of the piece in a file."""
        return "/".join(map(str, (self.kind, self.name, self.start, *(self.shard or ()))))


class FileRecord(NamedTuple):
    """Entry of a file in the manifest."""

    bytes: int
    sha256: str


def tensor_file(number: int) -> str:
    """Name of a tensor file; a run numbers its files by rank."""
    return f"tensors-{number:05d}.safetensors"


def listed(names: Iterable[str]) -> str:
    """First few of the names, with controls escaped, and the number of further names."""
    ordered = sorted(map(printable, names))
    more = len(ordered) - SHOWN
    return ", ".join(ordered[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def tensor_problems(found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> list[str]:
    """Differences between tensors that were found and those of a model: missing, surplus, of another shape.

    Returns:
        One phrase for each of the three kinds that occurs, such as "lacks a, b"; empty if the tensors fit.
    """
    problems = [f"lacks {listed(missing)}"] if (missing := shapes.keys() - found.keys()) else []
    problems += [f"holds {listed(surplus)}, unknown to the model"] if (surplus := found.keys() - shapes.keys()) else []
    other = [
        shape_problem(name, found[name], shape)
        for name, shape in shapes.items()
        if tuple(found.get(name, shape)) != tuple(shape)
    ]
    return problems + ([f"has {listed(other)}"] if other else [])


def shape_problem(name: str, found: torch.Size, expected: torch.Size) -> str:
    """Phrase for one tensor whose shape is not that of the model."""
    return f"{name} {tuple(found)} where the model has {tuple(expected)}"


def write_pieces(path: Path, pieces: Sequence[Piece]) -> FileRecord:
    """Write a safetensors file and flush it to disk; raises OSError if that fails."""
    header, offset = {}, 0
    for piece in pieces:
        tensor = piece.tensor
        size = tensor.numel() * tensor.element_size()
        header[piece.key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            digest.update(part)
            file.write(part)
        for piece in pieces:
            values = _buffer(piece.tensor.detach().cpu().contiguous())
            digest.update(values)
            file.write(values)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(8 + len(text) + offset, digest.hexdigest())


def _buffer(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a small file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def flush_folder(folder: Path) -> None:
    """Make files created, renamed or removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> FileRecord:
    """Return the current size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


class _Stored(NamedTuple):
    """Location of a piece."""

    start: int
    numel: int
    dtype: torch.dtype
    file: Path
    offset: int
    shard: Runs | None

    @property
    def end(self) -> int:
        """Element of the tensor behind the last one of the piece, or of its shard."""
        return self.start + self.numel if self.shard is None else self.shard.end


class PieceReader:
    """Tensors of a checkpoint folder, or ranges of them, assembled from the pieces in its files.

    Raises:
        CheckpointError: a file is not a safetensors file of pieces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for file in sorted(folder.glob(PATTERN)):
            for kind, name, piece in _read_header(file):
                self._pieces[kind, name].append(piece)
        if not self._pieces:
            raise CheckpointError(f"{folder} holds no {PATTERN}: take another checkpoint of the run")
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: (piece.start, piece.numel))

    def names(self, kind: str) -> set[str]:
        """Names of the tensors of a kind."""
        return {name for stored, name in self._pieces if stored == kind}

    def numel(self, kind: str, name: str) -> int:
        """Number of elements of a tensor, up to the end of its last piece."""
        return max((piece.end for piece in self._pieces.get((kind, name), [])), default=0)

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` (default: all) of a tensor, flat, as stored.

        Raises:
            CheckpointError: pieces leave a gap, overlap, or end before `stop`; or reading failed.
        """
        stop = self.numel(kind, name) if stop is None else stop
        if any(piece.shard is not None for piece in self._pieces.get((kind, name), [])):
            return self._joined(kind, name)[start:stop]
        parts: list[Tensor] = []
        reached = start
        for piece in self._pieces.get((kind, name), []):
            end = piece.start + piece.numel
            if end <= reached or piece.start >= stop:
                continue
            if piece.start > reached or (parts and piece.start < reached):
                break
            parts.append(_read(piece, reached - piece.start, min(end, stop) - piece.start))
            reached = min(end, stop)
        if reached < stop or not parts:
            raise CheckpointError(
                f"{self.folder} lacks elements {reached:,} to {stop:,} of {kind} {name}: take another checkpoint"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _joined(self, kind: str, name: str) -> Tensor:
        """All elements of a tensor that is stored in shards, flat; needs the memory of one tensor."""
        pieces, numel = self._pieces[kind, name], self.numel(kind, name)
        if sum(piece.numel for piece in pieces) != numel:  # before memory is allocated for what a header claims
            raise self._not_whole(kind, name, numel)
        whole, filled = torch.empty(numel, dtype=pieces[0].dtype), torch.zeros(numel, dtype=torch.bool)
        for piece in pieces:
            values = _read(piece, 0, piece.numel)
            for runs, first in (piece.shard or Runs.whole(numel)).parts(piece.start, piece.start + piece.numel):
                runs.view(whole).copy_(values[first : first + runs.numel].view(runs.number, runs.run))
                runs.view(filled).fill_(True)
        if not filled.all():
            raise self._not_whole(kind, name, numel)
        return whole

    def _not_whole(self, kind: str, name: str, numel: int) -> CheckpointError:
        problem = f"holds shards of {kind} {name} that do not make up its {numel:,} elements"
        return CheckpointError(f"{self.folder} {problem}: take another checkpoint")


def _read_header(file: Path) -> list[tuple[str, str, _Stored]]:
    try:
        size = file.stat().st_size
        (length,) = struct.unpack("<Q", read_file(file, 8, size=8))
        header = parse_json(read_file(file, limits.HEADER_BYTES, 8, length))
        return _stored(file, header, 8 + length, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file} is not a tensor file of a checkpoint ({excerpt(cause(error))}): take another one"
        ) from None


def _stored(file: Path, header: dict[str, Any], offset: int, size: int) -> list[tuple[str, str, _Stored]]:
    """Places of the pieces of a file, whose `size` bytes from `offset` on they fill without gaps or overlaps.

    Raises:
        ValueError: the header is not one that :func:`write_pieces` writes.
    """
    found, begin = [], 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, name, *numbers = key.split("/")
        (numel,), dtype, offsets = entry["shape"], _DTYPES[entry["dtype"]], entry["data_offsets"]
        is_number = all(number.isdecimal() and len(number) <= _DIGITS for number in numbers)
        if not is_number or len(numbers) not in (1, 5) or type(numel) is not int or numel < 0:
            raise ValueError(f"{key} has {numel!r} elements from {'/'.join(numbers)}")
        start, *runs = map(int, numbers)
        shard = Runs(*runs) if runs else None
        if shard is not None and not (shard.run <= shard.stride and start + numel <= shard.numel):
            raise ValueError(f"{key} has {numel:,} elements, which its shard does not hold")
        end = begin + numel * dtype.itemsize
        if end > size:
            raise ValueError(f"it ends too early: {key} needs {end:,} bytes of {size:,}")
        if offsets != [begin, end]:
            raise ValueError(f"{key} has {numel:,} elements in the bytes {offsets} of {size:,}")
        found.append((kind, name, _Stored(start, numel, dtype, file, offset + begin, shard)))
        begin = end
    if begin != size:
        raise ValueError(f"{size - begin:,} bytes behind the last piece")
    return found


def _read(piece: _Stored, first: int, end: int) -> Tensor:
    """Elements `first` to `end` of a piece."""
    values = torch.empty(end - first, dtype=piece.dtype)
    buffer = _buffer(values)
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.offset + first * piece.dtype.itemsize)
        while buffer.nbytes:
            read = file.readinto(buffer)
            if not read:
                raise CheckpointError(f"{piece.file} ends too early: take another checkpoint of the run")
            buffer = buffer[read:]
    return values
