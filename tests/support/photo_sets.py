"""Small data sets of photographs that are told apart by their color, and the pairs that `prepare` makes of them."""

import io
import json
import re
import tarfile

import numpy as np
from PIL import Image
from webdataset import WebDataset

from eve_ds.cli.prepare import main


def photo(number):
    """Image whose red channel is its number, so that a wrong caption is seen."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 200, 30)).save(file, "PNG")
    return file.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def pack(path, files, mode="w", form=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def prepare(out, *arguments):
    """Exit code of the command, pairs {number of the image: caption}, and reasons {reason: count}."""
    code, found, reasons = prepare_groups(out, *arguments)
    return code, {number: caption for number, (caption,) in found.items()}, reasons


def prepare_groups(out, *arguments):
    """As :func:`prepare`, with all captions of each image."""
    code = main([*map(str, arguments), "--out", str(out), "--workers", "1"])
    if code:
        assert not (out / ".prepare").exists(), "nothing is left half-written"
        assert not list(out.glob("*.tar"))
        return code, {}, {}
    report = json.loads((out / "report.json").read_text())
    return code, groups(out), {reason: entry["count"] for reason, entry in report["skipped"].items()}


def one_line(capsys):
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    assert lines[0].startswith("prepare: ")
    assert len(lines[0]) < 900
    return lines[0]


def groups(out):
    """Number of each image -> its captions, in the order of the shards."""
    found = {}
    for sample in WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False, empty_check=False):
        image = next(sample[suffix] for suffix in ("png", "jpg", "webp") if suffix in sample)
        red = int(np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))[0, 0, 0])
        captions = [sample[name].decode() for name in sample if re.fullmatch(r"([0-9]+\.)?txt", name)]
        assert red not in found, "an image is stored once"
        found[red] = captions
    return found
