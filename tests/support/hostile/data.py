"""Hostile data: shards that training reads, and images, archives and annotations that `prepare` reads."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tars import write_tar
from tiny import tiny_config

from eve_ds.cli.prepare import main as prepare
from eve_ds.data.pipeline import build_loader
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.objectives.registry import objectives_of
from hostile.case import BIGINT, DEEP, Case, endless, pipe, sparse, write


def picture(form: str = "PNG", side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(buffer, form)
    return buffer.getvalue()


def header(name: str, size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """Block of a tar with a valid checksum, and any bytes as its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def png_of_size(width: int, height: int) -> bytes:
    """PNG whose header claims a size that its data do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(bytes(9))),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _serve(spec: str, num: int) -> None:
    """Serve samples to training, and print what was skipped."""
    config = tiny_config(f"data.sources=[{{kind: shards, shards: {json.dumps(spec)}}}]", "data.num_workers=0")
    tokenizer, objectives = load_tokenizer("scenes"), objectives_of(config.model)
    loader = build_loader(config, tokenizer, objectives, rank=0, world_size=1, micro_batch_size=1)
    for _ in range(num):
        next(loader)
    print(f"served {num}, skipped {dict(Counter(loader.skipped))}")


def _sample(image: bytes, caption: bytes, folder: Path, _: Path) -> None:
    """Train on a good sample, the hostile one, and a good one."""
    good = [("jpg", picture("JPEG")), ("txt", b"a red circle")]
    samples = [("a", good), ("b", [("jpg", image), ("txt", caption)]), ("c", good)]
    write_tar(folder / "s.tar", [(f"{key}.{kind}", data) for key, members in samples for kind, data in members])
    _serve(str(folder / "s.tar"), 4)


def _members(key: str) -> bytes:
    """Part of a tar with one good sample, without the zeros at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in ((f"{key}.jpg", picture("JPEG")), (f"{key}.txt", b"a red circle")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()[: tar.offset]


def _block(block: bytes, folder: Path, _: Path) -> None:
    """Train on good samples around a hostile block of a tar."""
    write(folder / "s.tar", _members("a") + block + _members("c") + bytes(1024))
    _serve(str(folder / "s.tar"), 4)


def _index(content: Any, folder: Path, _: Path) -> None:
    """Train on a folder with a hostile index; beside the folder lies a shard that nothing may read."""
    write(folder / "canary.tar", _members("a") + bytes(1024))
    write(folder / "shards/s.tar", _members("a") + bytes(1024))
    index = folder / "shards/index.json"
    content(index) if callable(content) else write(index, content)
    _serve(str(folder / "shards"), 2)


def one_shard(name: str, samples: Any) -> dict[str, Any]:
    return {"version": 1, "shards": [{"name": name, "samples": samples, "bytes": 1, "sha256": "-"}]}


def _prepare(arguments: list[str], files: dict[str, Any], folder: Path, _: Path) -> int:
    """Run the command on files in `folder/in`; beside it lies a picture that nothing may read."""
    write(folder / "canary.png", picture())
    write(folder / "in/good.png", picture())
    for name, content in files.items():
        content(folder / "in" / name) if callable(content) else write(folder / "in" / name, content)
    words = [word.format(folder=folder / "in") for word in arguments]
    code = prepare([*words, "--out", str(folder / "out"), "--workers", "1"])
    assert code == 0 or not list((folder / "out").rglob("*.tar")), "nothing is half-written"
    return code


def _table(image: str, **files: Any) -> Callable[[Path, Path], int]:
    rows = f"image,caption\ngood.png,a red circle\n{image},a blue circle\n"
    return partial(_prepare, ["table", "{folder}/t.csv", "--images", "{folder}"], {"t.csv": rows, **files})


def _annotations(content: Any) -> Callable[[Path, Path], int]:
    return partial(_prepare, ["json", "{folder}/a.json", "--images", "{folder}"], {"a.json": content})


def _bomb(path: Path) -> None:
    """Archive of 128 MiB of zeros."""
    info = tarfile.TarInfo("nlvr/a.json")
    info.size = 2**27
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wb", 1) as file:
        file.write(info.tobuf())
        file.write(bytes(2**27))


ENTRIES = [{"image": "good.png", "caption": "a red circle"}]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n(canary) (w) file\nshowpage\n%%EOF\n"
GHOST = b"%!PS\n%%BoundingBox: 0 0 50 50\n%%EndComments\n"
SERVED = "served 4, skipped "
TABLE = "image,caption\ngood.png,a red circle\n"
CASES = {
    "PostScript called .jpg": Case(partial(_sample, EPS, b"a"), SERVED + "{'unreadable image .EPS.': 2}", 0),
    "other PostScript called .jpg": Case(partial(_sample, GHOST, b"a"), SERVED + "{'unreadable image .EPS.': 2}", 0),
    "an image of 10**10 pixels": Case(
        partial(_sample, png_of_size(10**5, 10**5), b"a"), SERVED + "{'decompression bomb': 2}", 0
    ),
    "an image without data": Case(
        partial(_sample, png_of_size(9000, 9000), b"a"), SERVED + "{'truncated image': 2}", 0
    ),
    "a caption of ten megabytes": Case(partial(_sample, picture(), b"a red circle " * 800_000), SERVED, 0),
    "a caption of escapes": Case(partial(_sample, picture(), b"\x1b[2J\n\0" * 9), SERVED, 0),
    "a caption that is not UTF-8": Case(
        partial(_sample, picture(), b"\xff\xfe\xff"), SERVED + "{'non-UTF-8 caption': 2}", 0
    ),
    "a negative size": Case(partial(_block, header("b.txt", b"-0000001000\0")), SERVED, 0),
    "a long name of a terabyte": Case(
        partial(_block, header("b.txt", b"\x80" + (2**40).to_bytes(11, "big"), b"L")), SERVED, 0
    ),
    "a sparse member": Case(partial(_block, header("b.txt", b"00000000000\0", b"S")), SERVED, 0),
    "an index of a shard above": Case(partial(_index, one_shard("../canary.tar", 1)), "index.json"),
    "an index of many samples": Case(partial(_index, one_shard("s.tar", "many")), "is not a shard index"),
    "a deep index": Case(partial(_index, DEEP), "is not a shard index .*nested deeper than 100 levels"),
    "an index of a bigint": Case(partial(_index, BIGINT), "is not a shard index .*100,000 digits"),
    "an index in a pipe": Case(partial(_index, pipe), "is not a shard index .not a regular file"),
    "a list of 10**8 shards": Case(lambda *_: _serve("{00000000..99999999}.tar", 1), "more than"),
    "a shard of a missing user": Case(lambda *_: _serve("~no such user/s.tar", 1), "user/s.tar does not exist"),
    "a shard with a null in its name": Case(lambda *_: _serve("s\0.tar", 1), r"\(.s\\x00.tar.\): .* has no NUL"),
    "a shard of a long name": Case(lambda *_: _serve("x" * 5000, 1), "cannot be used: File name too long"),
    "a picture above the folder": Case(_table("../canary.png"), "skipped 1: .*canary.png", 0),
    "a picture by an absolute path": Case(_table("/tmp/canary.png"), "skipped 1: .*canary.png", 0),
    "a picture that is a device": Case(_table("/dev/zero"), "skipped 1: ", 0),
    "a picture that leads to a device": Case(_table("zero.png", **{"zero.png": endless}), "skipped 1: ", 0),
    "a picture that is a pipe": Case(_table("pipe.png", **{"pipe.png": pipe}), "skipped 1: ", 0),
    "a picture of a terabyte": Case(_table("big.png", **{"big.png": partial(sparse, size=2**40)}), "skipped 1: ", 0),
    "a picture with an escape in its name": Case(_table("\x1b[2J.png"), r"skipped 1: .*\\x1b\[2J.png", 0),
    "deep annotations": Case(_annotations(DEEP), "nested deeper than 100 levels"),
    "annotations of a bigint": Case(_annotations(BIGINT), "100,000 digits"),
    "annotations in a pipe": Case(_annotations(pipe), "a.json is not a file"),
    "annotations that are not UTF-8": Case(_annotations(b'[{"image": "\xff"}]'), "is not a caption JSON: expected"),
    "annotations with a picture above": Case(
        _annotations([*ENTRIES, {"image": "../canary.png", "caption": "a"}]), "skipped 1: .*canary.png", 0
    ),
    "an archive of zeros": Case(
        partial(_prepare, ["nlvr", "{folder}/a.tar.gz"], {"a.tar.gz": _bomb}), "unpacks to more than 20 times its size"
    ),
    "progress of another program": Case(
        partial(
            _prepare,
            ["table", "{folder}/t.csv", "--images", "{folder}"],
            {"t.csv": TABLE, "../out/.prepare/plan.json": DEEP},
        ),
        "plan.json is no file of this command .*nested deeper than 100 levels.*; remove .*, or choose another --out",
    ),
}
