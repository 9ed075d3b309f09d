"""Tars of small samples, for tests of shards."""

import io
import os
import tarfile


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
