"""`convert.py universal` on a checkpoint of more than 4 GiB: memory does not follow the size of the model.

Minutes of writing and 10 GB of disk: part of `make soak` only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import KINDS, Piece, record_of, write_pieces

CONVERT = Path(__file__).resolve().parents[2] / "launcher" / "convert.py"
LARGEST = 50_000_000
"""Elements of the largest tensor: 200 MB."""
OTHERS, ELEMENTS = 320, 2**20
GIB = 2**30


@pytest.mark.timeout(900)
@pytest.mark.skipif("EVE_DS_SOAK" not in os.environ, reason="minutes and 10 GB of disk: make soak")
def test_memory_stays_below_twice_the_largest_tensor_and_a_gib(tmp_path):
    source, out = tmp_path / "cut", tmp_path / "whole"
    source.mkdir()
    values = torch.randn(LARGEST)
    records = {}
    for rank in range(2):  # each tensor cut in two
        pieces = []
        for kind in KINDS:
            half = LARGEST // 2
            pieces.append(Piece(kind, "largest", rank * half, values[rank * half : (rank + 1) * half]))
            for number in range(OTHERS):
                start = number * 1000
                half = ELEMENTS // 2
                part = values[start + rank * half : start + (rank + 1) * half]
                pieces.append(Piece(kind, f"other{number}", rank * half, part))
        file = f"tensors-{rank:05d}.safetensors"
        records[file] = write_pieces(source / file, pieces)
    (source / manifest.STATE).write_text(json.dumps({"step": 1}))
    records[manifest.STATE] = record_of(source / manifest.STATE)
    manifest.write_manifest(source, {"step": 1}, records)
    size = sum(record.bytes for record in records.values())
    assert size > 4 * GIB
    command = [sys.executable, str(CONVERT), "universal", str(source), "--out", str(out)]
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    assert status == 0
    peak = usage.ru_maxrss * 1024
    print(f"{size / GIB:.2f} GiB in, largest tensor {4 * LARGEST / GIB:.2f} GiB, peak memory {peak / GIB:.2f} GiB")
    assert manifest.problems(out) == []
    assert peak < 2 * 4 * LARGEST + GIB
