"""Lock of a file: held by another process, free, or on a file system without locks."""

import errno
import fcntl
import os

import pytest

from eve_ds.file_lock import lock_file

OWNERS = [("process", "lockf"), ("file", "flock")]


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(("owner", "call"), OWNERS)
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, code, owner, call, wait):
    monkeypatch.setattr(fcntl, call, refuse(code))
    with (tmp_path / "lock").open("w") as file:
        lock_file(file, wait=wait, owner=owner)
    assert caplog.messages == [
        f"{tmp_path}/lock cannot be locked ({os.strerror(code)}), so nothing keeps two processes from writing there at "
        "a time: start one only"
    ]


@pytest.mark.parametrize(("owner", "call"), OWNERS)
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_two_errors_mean_that_another_process_holds_the_lock(tmp_path, monkeypatch, caplog, code, owner, call):
    monkeypatch.setattr(fcntl, call, refuse(code))
    with (tmp_path / "lock").open("w") as file, pytest.raises(BlockingIOError):
        lock_file(file, wait=False, owner=owner)
    assert caplog.messages == []


def refuse(code):
    def lock(*_):
        raise OSError(code, os.strerror(code))

    return lock


def test_the_lock_ends_with_its_process_and_children_do_not_hold_it(tmp_path):
    path, (ready, tell) = tmp_path / "lock", os.pipe()
    holder = os.fork()
    if not holder:
        file = path.open("w")
        lock_file(file, wait=False, owner="process")
        child = os.fork()  # like a data worker, which may outlive the run
        os.write(tell, b"%d\n" % child if child else b"")
        os.read(os.pipe()[0], 1)
    child = int(os.read(ready, 16))
    try:
        with path.open("w") as file, pytest.raises(BlockingIOError):
            lock_file(file, wait=False, owner="process")
        os.kill(holder, 9)
        os.waitpid(holder, 0)
        with path.open("w") as file:
            lock_file(file, wait=False, owner="process")
    finally:
        os.kill(child, 9)
