"""Hostile checkpoints: manifests, pointers, pieces and counters of a run that another user copied here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from drawn_run import sign
from safetensors.torch import load_file, save_file

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import PieceReader
from eve_ds.checkpoint.weights import find_checkpoint
from eve_ds.cli.convert import main as convert
from hostile.case import BIGINT, CANARY, DEEP, Case, endless, pipe, sparse, write
from hostile.weights import entry, safetensors

STEP = "step-00000007"


def _export(change: Callable[[Path], Any], folder: Path, honest: Path, signed: bool = True) -> int:
    """Export a run after `change(checkpoint)`; `signed` writes a manifest of the changed files."""
    copytree(honest / "run", folder / "run", symlinks=True)
    checkpoint = folder / "run/checkpoints" / STEP
    change(checkpoint)
    if signed:
        sign(checkpoint)
    code = convert([str(folder / "run"), "--out", str(folder / "out")])
    assert not (folder / "out").exists() or code == 0, "nothing is half-written"
    return code


def _manifest(change: Callable[[dict[str, Any]], Any], folder: Path, honest: Path) -> int:
    """Export after `change` of the tree of manifest.json."""

    def rewrite(checkpoint: Path) -> None:
        write(folder / "run/canary.json", b"{}")
        tree = json.loads((checkpoint / "manifest.json").read_bytes())
        changed = change(tree)
        write(checkpoint / "manifest.json", tree if changed is None else changed)

    return _export(rewrite, folder, honest, signed=False)


def _lists(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["files"].update({name: {"bytes": 2, "sha256": "0"}})


def _replaced(name: str, content: bytes | Any, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    content(checkpoint / name) if callable(content) else write(checkpoint / name, content)


def _linked_out(checkpoint: Path) -> None:
    """Move a file out of the folder, and leave a link: sizes and hashes still agree."""
    file = checkpoint / "tensors-00000.safetensors"
    outside = checkpoint.parents[1] / f"{CANARY}.safetensors"
    file.rename(outside)
    file.symlink_to(outside)


def _pieces(header: Any, data: bytes, folder: Path, _: Path) -> None:
    """Read a folder with one file of pieces, whatever its manifest says."""
    content = header(folder / "tensors-00000.safetensors") if callable(header) else safetensors(header, data)
    if not callable(header):
        write(folder / "tensors-00000.safetensors", content)
    reader = PieceReader(folder)
    for name in sorted(reader.names("master")):
        print(f"read {name}: {reader.read('master', name).numel()} elements")


def _pointer(content: bytes | Callable[[Path], Any], folder: Path, honest: Path) -> None:
    """Find the newest checkpoint of a run with another `latest`; one outside the run must not be found."""
    copytree(honest / "run", folder / "run")
    copytree(honest / "run/checkpoints" / STEP, folder / "step-00000009")
    latest = folder / "run/checkpoints/latest"
    latest.unlink()
    content(latest) if callable(content) else write(latest, content)
    print(f"found {find_checkpoint(folder / 'run').relative_to(folder)}")


def _leftovers(folder: Path, honest: Path) -> None:
    """Leftovers of killed processes that lead elsewhere."""
    root = folder / "checkpoints"
    write(folder / "precious/a", b"content")
    root.mkdir()
    (root / ".saving-1").symlink_to(folder / "precious")
    (root / ".deleting-2").symlink_to(folder / "missing")
    write(root / ".saving-3", b"a file")
    write(root / ".deleting-4/a", b"a folder")
    (root / ".deleting-4/b").symlink_to(folder / "precious")
    manifest.remove_leftovers(root)
    print(f"left {sorted(path.name for path in root.iterdir())} and {(folder / 'precious/a').read_text()}")


def _check_batch(change: Callable[[dict[str, torch.Tensor]], Any], checkpoint: Path) -> None:
    file = checkpoint / "check_batch.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"device": "cpu"})


def piece(numel: Any, begin: int, end: int) -> dict[str, Any]:
    return entry([numel], [begin, end])


TWO = {"master/a/0": piece(2, 0, 8)}
NO_FILE = "tensors-00000.safetensors is not a tensor file of a checkpoint"
DAMAGED = "checkpoint .* is damaged: "
CASES = {
    "a file above the folder": Case(
        partial(_manifest, _lists("../../canary.json")), "names '../../canary.json', which is"
    ),
    "an absolute file": Case(
        partial(_manifest, _lists("/tmp/canary.json")), "names '/tmp/canary.json', which is no file"
    ),
    "a file above by a detour": Case(
        partial(_manifest, _lists("tokenizer/../../../canary.json")), "no file inside the fol"
    ),
    "an empty name": Case(partial(_manifest, _lists("")), "names '', which is no file inside the folder"),
    "a name of a megabyte": Case(partial(_manifest, _lists("a" * 10**6)), r"names 'a{300} \.\.\.', which is no file"),
    "a name with a null": Case(partial(_manifest, _lists("a\0b")), r"names 'a\\x00b', which is no file inside"),
    "a name with an escape": Case(partial(_manifest, _lists("\x1b[2J")), r"\\x1b\[2J is missing"),
    "a size in words": Case(
        partial(_manifest, lambda tree: tree["files"]["state.json"].update(bytes="many")),
        "no size in bytes, or no hash, of s",
    ),
    "a size of 400 digits": Case(
        partial(_manifest, lambda tree: tree["files"]["state.json"].update(bytes=10**400)), "a number has 401 digits"
    ),
    "a hash that is a list": Case(
        partial(_manifest, lambda tree: tree["files"]["state.json"].update(sha256=[1])),
        "no size in bytes, or no hash, of s",
    ),
    "an unknown key": Case(
        partial(_manifest, lambda tree: tree["files"]["state.json"].update(mode=7)),
        "is not a list of files with their sizes",
    ),
    "a deep manifest": Case(
        partial(_manifest, lambda tree: DEEP), "manifest.json is not JSON .*nested deeper than 100 lev"
    ),
    "a manifest that is a bigint": Case(
        partial(_manifest, lambda tree: BIGINT), "manifest.json is not JSON .*100,000 digits"
    ),
    "a manifest in a pipe": Case(
        partial(_export, partial(_replaced, "manifest.json", pipe), signed=False),
        "manifest.json cannot be read .not a regular",
    ),
    "a terabyte of a manifest": Case(
        partial(_export, partial(_replaced, "manifest.json", partial(sparse, size=2**40)), signed=False),
        "bytes, more than the",
    ),
    "a file that is a pipe": Case(
        partial(_export, partial(_replaced, "state.json", pipe), signed=False),
        DAMAGED + "state.json is no regular file",
    ),
    "a file that is a device": Case(
        partial(_export, partial(_replaced, "state.json", endless), signed=False),
        DAMAGED + "state.json is no regular file",
    ),
    "a surplus pipe": Case(
        partial(_export, lambda checkpoint: pipe(checkpoint / "tensors-00009.safetensors"), signed=False),
        DAMAGED + "tensors-00009.safetensors not in manifest.json",
    ),
    "a file that leads out": Case(
        partial(_export, _linked_out, signed=False),
        "tensors-00000.safetensors is a symbolic link out of the folder .cp -rL",
    ),
    "`latest` in a pipe": Case(partial(_pointer, pipe), f"found run/checkpoints/{STEP}", 0),
    "`latest` without an end": Case(partial(_pointer, endless), f"found run/checkpoints/{STEP}", 0),
    "`latest` outside": Case(partial(_pointer, b"../../step-00000009"), f"found run/checkpoints/{STEP}", 0),
    "`latest` of a terabyte": Case(partial(_pointer, partial(sparse, size=2**40)), f"found run/checkpoints/{STEP}", 0),
    "`latest` of many digits": Case(partial(_pointer, b"step-" + b"9" * 4000), f"found run/checkpoints/{STEP}", 0),
    "leftovers that lead elsewhere": Case(_leftovers, r"left \[\] and content", 0),
    "no piece": Case(partial(_pieces, {}, b""), "holds no tensors-.*: take another checkpoint"),
    "pieces in a list": Case(partial(_pieces, [], b""), NO_FILE),
    "a header beyond the file": Case(
        partial(_pieces, lambda path: write(path, struct.pack("<Q", 2**60)), b""), NO_FILE
    ),
    "a file of three bytes": Case(partial(_pieces, lambda path: write(path, b"abc"), b""), NO_FILE),
    "a deep header": Case(partial(_pieces, DEEP, b""), NO_FILE + " .*nested deeper than 100 levels"),
    "a piece from a negative element": Case(partial(_pieces, {"master/a/-2": piece(2, 0, 8)}, bytes(8)), NO_FILE),
    "a piece from element 10**30": Case(partial(_pieces, {f"master/a/{10**30}": piece(2, 0, 8)}, bytes(8)), NO_FILE),
    "a piece from element 2**59": Case(
        partial(_pieces, {f"master/a/{2**59}": piece(2, 0, 8)}, bytes(8)),
        "lacks elements 0 to 576,460,752,303,423,490 of",
    ),
    "a piece of 2**62 elements": Case(
        partial(_pieces, {"master/a/0": piece(2**62, 0, 2**64)}, bytes(8)), NO_FILE + ".*it ends too early"
    ),
    "a piece of a negative number of elements": Case(
        partial(_pieces, {"master/a/0": piece(-2, 8, 0)}, bytes(8)), NO_FILE
    ),
    "a piece of half an element": Case(partial(_pieces, {"master/a/0": piece(0.5, 0, 2)}, bytes(2)), NO_FILE),
    "a piece of true elements": Case(partial(_pieces, {"master/a/0": piece(True, 0, 4)}, bytes(4)), NO_FILE),
    "a piece of two dimensions": Case(partial(_pieces, {"master/a/0": entry([1, 2], [0, 8])}, bytes(8)), NO_FILE),
    "a piece of another number format": Case(
        partial(_pieces, {"master/a/0": entry([1], [0, 8], "I64")}, bytes(8)), NO_FILE
    ),
    "two pieces of the same bytes": Case(partial(_pieces, {**TWO, "master/b/0": piece(2, 0, 8)}, bytes(8)), NO_FILE),
    "pieces with a gap": Case(partial(_pieces, {**TWO, "master/b/0": piece(2, 12, 20)}, bytes(20)), NO_FILE),
    "bytes behind the last piece": Case(partial(_pieces, TWO, bytes(12)), NO_FILE + ".*4 bytes behind the last piece"),
    "a name with more parts": Case(partial(_pieces, {"master/../../a/0": piece(2, 0, 8)}, bytes(8)), NO_FILE),
    "a name with an escape and a line": Case(
        partial(_pieces, {"master/\x1b[2J\nx/0": piece(2, 8, 16)}, bytes(16)),
        NO_FILE + r".*\\x1b\[2J x/0 has 2 elements",
    ),
    "a shard that claims a large tensor": Case(
        partial(_pieces, {f"master/a/0/{2**50}/2/2/1": piece(2, 0, 8)}, bytes(8)),
        "holds shards of master a that do not",
    ),
    "a shard that holds fewer elements": Case(
        partial(_pieces, {"master/a/1/0/2/2/1": piece(2, 0, 8)}, bytes(8)), NO_FILE + ".*which its shard does not hold"
    ),
    "a shard whose runs overlap": Case(
        partial(_pieces, {"master/a/0/0/2/1/2": piece(2, 0, 8)}, bytes(8)), NO_FILE + ".*which its shard does not hold"
    ),
    "a shard without runs": Case(
        partial(_pieces, {"master/a/0/9/1/1/0": piece(0, 0, 0), **TWO}, bytes(8)),
        "holds shards of master a that do not",
    ),
    "pieces that overlap": Case(
        partial(_pieces, {**TWO, "master/a/1": piece(2, 8, 16)}, bytes(16)), "lacks elements 2 to 3 of master a"
    ),
    "two pieces from one element": Case(
        partial(_pieces, {**TWO, "master/a/00": entry([2], [8, 12], "BF16")}, bytes(12)), "read a: 2 elements", 0
    ),
    "a step in words": Case(
        partial(_export, partial(_replaced, "state.json", {"step": "many"})),
        r"state.json has step \('many'\), which must be",
    ),
    "no step": Case(
        partial(_export, partial(_replaced, "state.json", {})), r"state.json has step \(None\), which must be a wh"
    ),
    "a negative step": Case(
        partial(_export, partial(_replaced, "state.json", {"step": -1})), r"has step \(-1\), which must"
    ),
    "a topology in a list": Case(
        partial(_export, partial(_replaced, "state.json", {"step": 7, "topology": ["x"]})),
        "topology or seconds of another type",
    ),
    "recorded outputs in another form": Case(
        partial(_export, partial(_replaced, "check_batch.safetensors", DEEP)), "check_batch.safetensors cannot be read"
    ),
    "recorded inputs of another shape": Case(
        partial(
            _export,
            partial(_check_batch, lambda tensors: tensors.update({"input.pixel_values": torch.zeros(1, 3, 8, 8)})),
        ),
        "check_batch.safetensors holds no inputs of this model",
    ),
    "recorded ids beyond the table": Case(
        partial(
            _export,
            partial(
                _check_batch, lambda tensors: tensors.update({"input.input_ids": torch.tensor([[2, 2**40, 4, 11, 3]])})
            ),
        ),
        "check_batch.safetensors holds no inputs of this model",
    ),
    "recorded outputs of another shape": Case(
        partial(
            _export, partial(_check_batch, lambda tensors: tensors.update({"output.token_logits": torch.zeros(2**10)}))
        ),
        r"check_batch.safetensors has token_logits \(1024,\) where the model has",
    ),
    "a recorded output of another name": Case(
        partial(_export, partial(_check_batch, lambda tensors: tensors.update({"output.x\ny": torch.zeros(2)}))),
        r"check_batch.safetensors holds x\\ny, unknown to the model",
    ),
    "a recorded output that is not finite": Case(
        partial(
            _export,
            partial(_check_batch, lambda tensors: tensors["output.token_logits"].fill_(float("nan"))),
        ),
        "differ by nan",
    ),
    "a damaged tokenizer": Case(
        partial(_export, lambda checkpoint: write(checkpoint / "tokenizer/tokenizer.json", DEEP)),
        "tokenizer.json cannot be read: lists and objects are nested deeper than 100 levels",
    ),
}
