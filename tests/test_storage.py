"""Files that appear whole or not at all, and errors of the disk told from other errors."""

import errno
import os

import pytest
from safetensors import SafetensorError

from eve_ds.storage import is_disk_error, reason, replace_file


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), True, "/runs/a: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True, "Disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system", "/runs"), True, "/runs: Read-only file system"),
        (OSError(errno.EIO, "Input/output error"), True, "Input/output error"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True, "No space left on device"),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), False, "No such file or directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), False, "x: No such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), False, "x: Permission denied"),
        (OSError("text\nalone"), False, "text alone"),
        (ValueError("28"), False, "28"),
    ],
)
def test_errors_of_the_disk_are_told_from_other_errors(error, expected, text):
    assert is_disk_error(error) is expected
    assert reason(error) == text


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "config.json"
    replace_file(path, "before")
    if step == "open":
        path.with_name(".config.json.writing").mkdir()
    else:
        monkeypatch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"full|Is a directory"):
        replace_file(path, "after")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["config.json"]


def test_bytes_and_text_are_written_as_given(tmp_path):
    replace_file(tmp_path / "a", "ö\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xb6\n"
    replace_file(tmp_path / "a", b"\x00\r\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
