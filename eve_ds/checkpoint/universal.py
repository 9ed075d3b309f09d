"""Checkpoint whose tensor files do not depend on the number of ranks that wrote it.

It is an ordinary checkpoint, so runs resume from it and exports are made from it. In addition, other programs can read
its tensors without knowing how ranks partitioned them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import (
    KINDS,
    PATTERN,
    CheckpointError,
    FileRecord,
    Piece,
    PieceReader,
    record_of,
    tensor_file,
    write_pieces,
)
from eve_ds.checkpoint.output_folder import check_output_folder, replacing

FILE_BYTES = 2**28
"""Size beyond which a file is closed, so that little data is in memory at a time."""


class UniversalReport(NamedTuple):
    """Summary of the written folder."""

    step: int
    tensors: int
    files: int
    bytes: int


def write_universal(checkpoint: Path, out: Path) -> UniversalReport:
    """Write the whole tensors of a good checkpoint into the new folder `out`.

    Memory use stays below `FILE_BYTES` plus twice the largest tensor. A killed process leaves at most a hidden folder,
    which the next process removes.

    Raises:
        CheckpointError: `out` is a file or is not empty, or the checkpoint does not hold every tensor whole.
        OSError: writing failed.
    """
    check_output_folder(out, CheckpointError)
    with replacing(out) as hidden:
        reader = PieceReader(checkpoint)
        records = _write_tensors(reader, hidden)
        tensors = sum(len(reader.names(kind)) for kind in KINDS)
        records |= _copy_others(checkpoint, hidden)
        source = manifest.read_json(checkpoint / manifest.MANIFEST)
        content = {key: value for key, value in source.items() if key not in ("format", "files")}
        manifest.write_manifest(hidden, content, records)
    files = [record for name, record in records.items() if Path(name).match(PATTERN)]
    return UniversalReport(int(source["step"]), tensors, len(files), sum(record.bytes for record in files))


def _write_tensors(reader: PieceReader, folder: Path) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    pieces: list[Piece] = []

    def close_file() -> None:
        name = tensor_file(len(records))
        records[name] = write_pieces(folder / name, pieces)
        pieces.clear()

    for kind in KINDS:
        for name in sorted(reader.names(kind)):
            pieces.append(Piece(kind, name, 0, reader.read(kind, name)))
            if sum(piece.tensor.nbytes for piece in pieces) >= FILE_BYTES:
                close_file()
    if pieces:
        close_file()
    return records


def _copy_others(source: Path, target: Path) -> dict[str, FileRecord]:
    """Copy settings, tokenizer, counters and data positions: everything except the tensors and the manifest."""
    records = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and not path.match(PATTERN) and path.name != manifest.MANIFEST:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            records[str(name)] = record_of(target / name)
    return records
