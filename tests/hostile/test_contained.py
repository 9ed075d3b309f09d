"""The child of the corpus reports what it must not do, and ends when it takes too long or too much memory."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import contained as module
from hostile.contained import contained

from eve_ds.config import ConfigError


def fails():
    raise ConfigError("one line")


def is_a_bug():
    raise RuntimeError("no line")


@pytest.mark.parametrize(
    ("action", "code", "text"),
    [
        (lambda: None, 0, ""),
        (lambda: 4, 4, ""),
        (lambda: sys.exit(3), 3, ""),
        (fails, 2, "case: one line\n"),
        (is_a_bug, 1, "Traceback"),
        (lambda: bytearray(3 * 2**30), 2, "case: out of memory"),
        (lambda: print("\udcff"), 0, r"\udcff"),
    ],
)
def test_code_and_output_are_those_of_a_command(tmp_path, action, code, text):
    outcome = contained(action, tmp_path)
    assert outcome.code == code
    assert text in outcome.output
    assert outcome.forbidden == ""


@pytest.mark.parametrize(
    ("action", "event"),
    [
        (lambda: subprocess.run(["true"], check=False), "subprocess.Popen"),
        (lambda: os.system("true"), "os.system"),
        (lambda: os.posix_spawn("/bin/true", ["true"], {}), "os.posix_spawn"),
        (lambda: os.execv("/bin/true", ["true"]), "os.exec"),
        (lambda: socket.socket().connect_ex(("127.0.0.1", 1)), "socket.connect"),
        (lambda: socket.getaddrinfo("localhost", 1), "socket.getaddrinfo"),
        (lambda: Path("canary/x").read_bytes(), "opened {folder}/canary/x"),
        (lambda: os.close(os.open("link", os.O_RDONLY)), "opened {folder}/canary/x"),
    ],
)
def test_forbidden_actions_are_reported(tmp_path, monkeypatch, action, event):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary/x").touch()
    (tmp_path / "link").symlink_to("canary/x")
    assert event.format(folder=tmp_path) in contained(action, tmp_path).forbidden


def test_a_child_that_hangs_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.3)
    assert contained(lambda: time.sleep(60), tmp_path).code == -9
