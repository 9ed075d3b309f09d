"""A library that another user could have written is never loaded, and no lock empties another file."""

import os
import stat
from types import SimpleNamespace

import pytest

from eve_ds.ops import build, library_cache

FOREIGN = 54321
"""User without an account."""


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Folder of libraries; instead of a compiler, a function writes the library and counts its calls."""
    calls = []

    def compile_(jobs, link, library):
        calls.append(library)
        library.write_bytes(b"ours")
        library.chmod(0o755)

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build, "_cpu_jobs", lambda: ([], ("cc",)))
    monkeypatch.setattr(build, "_digest", lambda jobs, link: "0")
    monkeypatch.setenv("EVE_DS_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(folder=tmp_path / "cache", library=tmp_path / "cache" / "eve_ds_cpu_0.so", calls=calls)


def test_the_folder_and_its_library_are_private(compiled):
    assert build.build("cpu") == build.build("cpu") == compiled.library
    assert len(compiled.calls) == 1
    assert stat.S_IMODE(compiled.folder.stat().st_mode) == 0o700
    assert library_cache.is_trusted(compiled.library)


PLANTED = {
    "writable by its group": lambda path: path.chmod(0o775),
    "writable by all": lambda path: path.chmod(0o777),
    "of another user": lambda path: os.chown(path, FOREIGN, -1),
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_folder_that_others_can_write_is_refused(compiled, how):
    if how == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    compiled.folder.mkdir(mode=0o755)
    compiled.library.write_bytes(b"planted")
    PLANTED[how](compiled.folder)
    with pytest.raises(build.OpsBuildError, match=r"cache (belongs to another|can be written by other) user.*EVE_DS_C"):
        build.build("cpu")
    assert not compiled.calls
    assert [path.name for path in compiled.folder.iterdir()] == [compiled.library.name], "nothing is written there"


@pytest.mark.parametrize("how", PLANTED)
def test_a_library_that_others_can_write_is_replaced(compiled, how):
    if how == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    compiled.folder.mkdir(mode=0o755)
    compiled.library.write_bytes(b"planted")
    PLANTED[how](compiled.library)
    assert not library_cache.is_trusted(compiled.library)
    build.build("cpu")
    assert compiled.calls == [compiled.library]


def test_neither_a_link_nor_a_folder_is_trusted(tmp_path):
    (tmp_path / "a.so").write_bytes(b"")
    (tmp_path / "a.so").chmod(0o755)
    (tmp_path / "b.so").symlink_to(tmp_path / "a.so")
    assert library_cache.is_trusted(tmp_path / "a.so")
    (tmp_path / "c.so").mkdir(mode=0o755)
    assert not any(library_cache.is_trusted(tmp_path / name) for name in ("b.so", "c.so", "none.so"))


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_lock_empties_and_creates_no_other_file(compiled, tmp_path, kind):
    compiled.folder.mkdir(mode=0o755)
    target, lock = tmp_path / "precious", compiled.library.with_suffix(".lock")
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(target)
    if kind == "link":
        target.write_text("content")
    if kind == "pipe":
        build.build("cpu")  # locked as it is: a pipe holds nothing
        return
    with pytest.raises(build.OpsBuildError, match=r"eve_ds_cpu_0.lock cannot be written .*name another folder"):
        build.build("cpu")
    assert (target.read_text() if kind == "link" else target.exists()) in ("content", False)


def test_a_lock_keeps_its_file(tmp_path):
    (tmp_path / "a.lock").write_text("content")
    with library_cache.locked(tmp_path / "a.lock"):
        pass
    assert (tmp_path / "a.lock").read_text() == "content"


def test_a_built_library_is_found_without_a_lock(compiled, monkeypatch):
    build.build("cpu")
    monkeypatch.setattr(build, "locked", lambda path: pytest.fail("a read-only disk takes no lock"))
    assert build.build("cpu") == compiled.library


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("file", "cannot be written .*name another folder in EVE_DS_CACHE"),
        ("file/below", "cannot be written"),
        ("/proc/x", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line(compiled, monkeypatch, tmp_path, place, text):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVE_DS_CACHE", str(tmp_path / place))
    with pytest.raises(build.OpsBuildError, match=text):
        build.build("cpu")


def test_a_user_without_a_home_folder_is_told_of_the_variable(compiled, monkeypatch):
    for name in ("EVE_DS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library_cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(build.OpsBuildError, match="no home folder: name a folder for compiled libraries in EVE_DS_CAC"):
        build.build("cpu")
