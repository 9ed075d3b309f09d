"""Hostile weights: safetensors files, pickles, indexes, and folders of other programs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import overrides as tiny_overrides

from eve_ds.cli.convert import main as convert
from eve_ds.config import load_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import load
from eve_ds.export.upcycle import upcycle
from eve_ds.tasks.saved import load_task_model
from hostile.case import BIGINT, DEEP, Case, endless, pipe, sparse, write


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Safetensors file with any header, as a tree or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class _Program:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def zipped(content: bytes, compression: int) -> Callable[[Path], None]:
    """Writer of an archive like that of torch.save, with a pickle that a cap must keep from being unpacked."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")

    return make


def shared_many_times(path: Path) -> None:
    """A tensor of a byte that claims a terabyte of elements by a stride of 0."""
    torch.save({"backbone.a": torch.zeros(1).expand(2**38)}, path)


def _import(name: str, content: bytes | Callable[[Path], Any], folder: Path, honest: Path) -> int:
    content(folder / name) if callable(content) else write(folder / name, content)
    words = ["import", folder / name, "--out", folder / "out", "--config", "eve_tiny", "--tokenizer", "scenes"]
    code = convert(list(map(str, words)))
    assert not (folder / "out").exists(), "nothing is half-written"
    return code


def _export(change: Callable[[Path], Any], folder: Path, honest: Path) -> None:
    """Load an export that `change` has damaged."""
    shutil.copytree(honest / "export", folder / "export")
    change(folder / "export")
    load(folder / "export")


def _index(weight_map: Any, folder: Path, honest: Path) -> None:
    write(folder / "canary.safetensors", (honest / "export/model.safetensors").read_bytes())
    tree = {"weight_map": weight_map}
    _export(lambda export: write(export / "model.safetensors.index.json", tree), folder, honest)


def _not_finite(export: Path) -> None:
    data = bytearray((export / "model.safetensors").read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    write(export / "model.safetensors", bytes(data))


def _task(name: str, content: Any, folder: Path, honest: Path) -> None:
    """Load a fine-tuned model of which one file is damaged."""
    shutil.copytree(honest / "task", folder / "task")
    (folder / "task" / name).unlink(missing_ok=True)
    content(folder / "task" / name) if callable(content) else write(folder / "task" / name, content)
    load_task_model(folder / "task")


def _upcycle(about: Any, tensors: dict[str, torch.Tensor], folder: Path, _: Path) -> None:
    """Start from a folder of Hugging Face, or, without a config.json, from a BEiTv2."""
    if about is None:
        torch.save(tensors, folder / "a.pth")
    else:
        write(folder / "config.json", about)
        torch.save(tensors, folder / "pytorch_model.bin")
    load_tokenizer("scenes")
    upcycle(folder if about is not None else folder / "a.pth", load_config("eve_tiny", list(tiny_overrides())))


VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
BEIT2 = {
    "cls_token": torch.zeros(1, 1, 32),
    "blocks.0.mlp.fc1.weight": torch.zeros(48, 32),
    "patch_embed.proj.weight": torch.zeros(32, 3, 8, 8),
}
CUT_OFF = "cannot be read .*: it may be damaged"
CASES = {
    "a header beyond the file": Case(partial(_import, "a.safetensors", safetensors({}, length=2**20)), CUT_OFF),
    "a header of an exabyte": Case(partial(_import, "a.safetensors", safetensors({}, length=2**62)), CUT_OFF),
    "a deep header": Case(partial(_import, "a.safetensors", safetensors(DEEP)), CUT_OFF),
    "a header of a bigint": Case(partial(_import, "a.safetensors", safetensors(b'{"a":' + BIGINT + b"}")), CUT_OFF),
    "overlapping tensors": Case(
        partial(_import, "a.safetensors", safetensors({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12))),
        CUT_OFF,
    ),
    "a tensor at a negative place": Case(
        partial(_import, "a.safetensors", safetensors({"a": entry([2], [-8, 0])}, bytes(8))), CUT_OFF
    ),
    "a tensor of 2**63 elements": Case(
        partial(_import, "a.safetensors", safetensors({"a": entry([2**31, 2**32], [0, 8])}, bytes(8))), CUT_OFF
    ),
    "a tensor of 2**62 empty rows": Case(
        partial(_import, "a.safetensors", safetensors({"a": entry([2**62, 0], [0, 0])})),
        "holds a, no part of|" + CUT_OFF,
    ),
    "one name twice": Case(
        partial(
            _import,
            "a.safetensors",
            safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], [0, 4])).encode(),) * 2), bytes(4)),
        ),
        "holds a, no part of|" + CUT_OFF,
    ),
    "a number format that torch lacks": Case(
        partial(_import, "a.safetensors", safetensors({"a": entry([8], [0, 6], "F6_E2M3")}, bytes(6))), CUT_OFF
    ),
    "a name with an escape": Case(
        partial(_import, "a.safetensors", safetensors({"\x1b[31m\nx": entry([1], [0, 4])}, bytes(4))),
        r"holds \\x1b\[31m\\nx, no part of the backbone",
    ),
    "a pipe called .bin": Case(partial(_import, "a.bin", pipe), "a.bin is not a file"),
    "a device called .safetensors": Case(partial(_import, "a.safetensors", endless), "a.safetensors is not a file"),
    "a pickle that runs a program": Case(
        partial(_import, "a.bin", pickle.dumps({"a": _Program()})), "is not a file that torch.save wrote"
    ),
    "a torch file that runs a program": Case(
        partial(_import, "a.pth", lambda path: torch.save({"a": _Program()}, path)),
        r"refers to \w+\.system, which could run",
    ),
    "a legacy torch file that runs a program": Case(
        partial(
            _import,
            "a.pth",
            lambda path: torch.save({"a": _Program()}, path, _use_new_zipfile_serialization=False),
        ),
        r"refers to \w+\.system, which could run",
    ),
    "a torch file of compressed zeros": Case(
        partial(_import, "a.pth", zipped(bytes(2**28), zipfile.ZIP_DEFLATED)),
        "is compressed .268,.* unpacked., which torch",
    ),
    "a torch file of a damaged pickle": Case(
        partial(_import, "a.pth", zipped(b"\x80\x02]" + b"(" * 10**5, zipfile.ZIP_STORED)), CUT_OFF + "|holds more than"
    ),
    "a torch file of deep lists": Case(
        partial(_import, "a.pth", zipped(b"\x80\x02" + b"]" * 10**4 + b"a" * (10**4 - 1) + b".", zipfile.ZIP_STORED)),
        CUT_OFF + "|holds no dictionary of tensors|holds more than",
    ),
    "a torch file of tuples in tuples": Case(
        partial(_import, "a.pth", zipped(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", zipfile.ZIP_STORED)),
        "cannot be read .*a tuple of more than 100,000 items",
    ),
    "a legacy torch file of tuples in tuples": Case(
        partial(
            _import,
            "a.pth",
            pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
            + pickle.dumps(1001, 2)
            + pickle.dumps({"little_endian": True}, 2)
            + b"\x80\x02})"
            + b"q\x00h\x00\x86" * 60
            + b"K\x01s.",
        ),
        "cannot be read .*a tuple of more than 100,000 items",
    ),
    "a byte that claims a terabyte": Case(
        partial(_import, "a.pth", shared_many_times), "holds backbone.a, not a dense"
    ),
    "an archive that ends early": Case(
        partial(_import, "a.pth", b"PK\x03\x04" + bytes(100)), "is not a file that torch.s"
    ),
    "a terabyte of zeros": Case(
        partial(_import, "a.pth", partial(sparse, size=2**40)), "is not a file that torch.save"
    ),
    "an index that names a file above": Case(
        partial(_index, {"a": "../canary.safetensors"}), "no .safetensors file beside"
    ),
    "an index that names an absolute file": Case(
        partial(_index, {"a": "/tmp/canary.safetensors"}), "no .safetensors file"
    ),
    "an index that names a number": Case(partial(_index, {"a": 7}), "names 7, which is no .safetensors file beside it"),
    "an index that is a list": Case(partial(_index, ["a"]), "cannot be read .*: export it again"),
    "an index that names a missing file": Case(partial(_index, {"a": "b.safetensors"}), "lacks b.safetensors"),
    "a deep index": Case(
        partial(_export, lambda export: write(export / "model.safetensors.index.json", DEEP)), "nested deeper than 100"
    ),
    "a deep config.json": Case(
        partial(_export, lambda export: write(export / "config.json", DEEP)), "config.json is not JSON .*nested deeper"
    ),
    "a config.json that is no object": Case(
        partial(_export, lambda export: write(export / "config.json", b"7")), "must be a JSON object, not a int"
    ),
    "weights that are not finite": Case(partial(_export, _not_finite), "not finite"),
    "a deep vocabulary of answers": Case(partial(_task, "answers.json", DEEP), "answers.json cannot be read: .*deeper"),
    "a vocabulary of answers in a pipe": Case(
        partial(_task, "answers.json", pipe), "answers.json cannot be read: not a reg"
    ),
    "an answer that is a list": Case(partial(_task, "answers.json", [["a"]]), "must be a JSON list of strings"),
    "a config.json with auto_map": Case(
        partial(_upcycle, {**VIT, "auto_map": {"AutoModel": "canary.Canary"}}, {"a": torch.zeros(1)}),
        "has intermediate_size None where the model has 48",
    ),
    "a config.json of a billion layers": Case(
        partial(_upcycle, {**VIT, "num_hidden_layers": 10**9}, {"a": torch.zeros(1)}),
        "has 1,000,000,000 layers, more than",
    ),
    "a config.json with a size in words": Case(
        partial(_upcycle, {**VIT, "hidden_size": "many"}, {"a": torch.zeros(1)}),
        "hidden_size 'many', which must be a whole",
    ),
    "a config.json with a list for its kind": Case(
        partial(_upcycle, {"model_type": ["vit"]}, {"a": torch.zeros(1)}), r"has model_type \['vit'\]: only vit, beit"
    ),
    "a deep config.json of another library": Case(
        partial(_upcycle, DEEP, {"a": torch.zeros(1)}), "is not JSON .*nested"
    ),
    "a BEiTv2 of a billion layers": Case(
        partial(_upcycle, None, BEIT2 | {"blocks.999999999.norm1.weight": torch.zeros(1)}),
        "has 1,000,000,000 layers, more",
    ),
    "a BEiTv2 with a layer of 5,000 digits": Case(
        partial(_upcycle, None, BEIT2 | {f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(1)}),
        "has num_hidden_layers 1 where the model has 3",
    ),
}
