"""Files that appear whole or not at all, and errors of the disk told from other errors."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from eve_ds.storage import is_disk_error, output_path, reason, replace_file


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


class FullFile:
    """A file that takes `room` bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, content):
        self.room -= memoryview(content).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return memoryview(content).nbytes


@pytest.mark.parametrize("room", [0, 100, 5_000, 100_000])
def test_torch_save_on_a_full_disk_is_an_error_of_the_disk(room):
    tensors = {str(number): torch.zeros(1000) for number in range(30)}
    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save(tensors, FullFile(room))
    assert is_disk_error(caught.value)
    assert reason(caught.value) == "No space left on device"


@pytest.mark.parametrize("hidden", [False, True])
def test_error_after_one_of_the_disk_is_one_of_the_disk_unless_that_is_hidden(hidden):
    error = ValueError("other")
    error.__context__ = OSError(errno.ENOSPC, "full", "/runs/a")
    error.__suppress_context__ = hidden
    assert is_disk_error(error) is not hidden
    assert reason(error) == ("other" if hidden else "/runs/a: full")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/x",
            r"s3://bucket/x is an address \(s3:\), and only disks are written: name a path, upload later",
        ),
        ("gs://bucket", r"is an address \(gs:\)"),
        ("hdfs:/user/x", r"is an address \(hdfs:\)"),
        ("https://huggingface.co/me/x", r"is an address \(https:\)"),
        ("file:///tmp/x", r"is an address \(file:\)"),
        ("", "an empty path is given, perhaps by an unset variable of the shell: name a folder or file"),
        (os.fsdecode(b"runs/\xff"), "is not UTF-8: rename it"),
    ],
)
def test_path_that_no_disk_holds_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        output_path(path)


@pytest.mark.parametrize("path", ["a", ".", "/a/b c/ö", "~/x", "a:b", "me/model", "C:/x", "2026-11-28T05:43/x"])
def test_any_other_path_is_taken(path):
    assert str(output_path(path)) == path


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
