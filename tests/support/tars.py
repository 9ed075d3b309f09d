"""Tars of small samples, for tests of shards."""

import io
import json
import os
import tarfile

from eve_ds.data.shard_bytes import FileBytes
from eve_ds.data.shard_index import encode, scan_layout


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(count, prefix="s"):
    return [
        member
        for number in range(count)
        for member in (
            (f"{prefix}{number:04d}.jpg", os.urandom(700 + 400 * number)),
            (f"{prefix}{number:04d}.json", b"{}"),
            (f"{prefix}{number:04d}.txt", f"caption {number}".encode()),
        )
    ]


def write_index(folder, **changes):
    """Write an index of version 2 for the tars of a folder; `changes` replaces values of every entry."""
    entries = []
    for path in sorted(folder.glob("*.tar")):
        layout = scan_layout(FileBytes(path))
        entry = {"name": path.name, "samples": len(layout), "bytes": path.stat().st_size, "sha256": f"of {path.name}"}
        entries.append(entry | {"groups": encode(layout)} | changes)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
