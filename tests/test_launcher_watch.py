"""A rank ends when its launcher does, and when a signal finds it waiting outside of Python before training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eve_ds.launcher_watch import LauncherWatch, launcher_processes, still_above
from eve_ds.signals import Stopped, StopSignals

RANK = """
import ctypes, os, sys, time
from eve_ds import launcher_watch
from eve_ds.signals import Stopped, StopSignals
from eve_ds.launcher_watch import LauncherWatch

how = sys.argv[1]
launcher_watch.POLL_SECONDS, launcher_watch.GRACE_SECONDS = 0.1, 0.5
with StopSignals() as stop, LauncherWatch(stop, 4, 6, os.environ):
    if how == "training":
        stop.defer()
    try:
        try:
            print(os.getpid(), flush=True)
            time.sleep(60 if how == "importing" else 0)
        except BaseException:  # as some libraries do where they import others
            if how != "importing":
                raise
            time.sleep(0.5)
            os.environ["WORLD_SIZE"] = "2"  # the launcher is known later
            time.sleep(60)
        if how == "waiting":  # outside of Python, where no handler runs, as in a rendezvous
            mutex = ctypes.create_string_buffer(64)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
        while not stop.requested:
            time.sleep(0.02)
        sys.exit(5)
    except Stopped:
        sys.exit(6)
"""
SHELL = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def started(how, *, below=False, **environment):
    """A rank, or its launcher if `below`, and the id of the rank."""
    command = [sys.executable, "-c", *([SHELL] if below else []), RANK, how]
    environment = os.environ | environment
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    return process, int(process.stdout.readline())


def gone(process, seconds):
    """Whether a process of another parent ends in time; that parent may be late to notice."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("how", ["training", "starting"])
def test_a_rank_ends_with_its_launcher(how, number):
    launcher, rank = started(how, below=True, TORCHELASTIC_RUN_ID="x")
    launcher.send_signal(number)
    launcher.wait(10)
    assert gone(rank, 5)


def test_a_rank_that_a_shell_started_outlives_the_shell():
    launcher, rank = started("training", below=True, RANK="0", WORLD_SIZE="1")
    launcher.kill()
    launcher.wait(10)
    try:
        assert not gone(rank, 1)
    finally:
        os.kill(rank, signal.SIGKILL)


def test_a_rank_that_cannot_handle_a_signal_ends_with_the_code_of_one_that_does():
    process, _ = started("waiting", WORLD_SIZE="2")
    time.sleep(0.5)  # until it waits
    process.terminate()
    assert process.wait(20) == 4


def test_a_signal_ends_a_rank_whose_library_catches_the_exception():
    process, _ = started("importing")
    process.terminate()
    assert process.wait(20) == 4


def test_a_rank_notices_a_peer_that_ended_soon_after_it_began():
    peer, _ = started("starting", PMI_RANK="0")
    waiting, _ = started("waiting", WORLD_SIZE="2", PMI_RANK="1")
    peer.kill()
    peer.wait()
    assert waiting.wait(20) == 6


def test_a_rank_that_waits_before_training_ends_with_a_peer_of_its_host():
    """This process is the launcher, which ends no rank because of another."""
    waiting, _ = started("waiting", WORLD_SIZE="2", PMI_RANK="0")
    peer, _ = started("starting", WORLD_SIZE="2", PMI_RANK="1")
    training, _ = started("training", WORLD_SIZE="2", PMI_RANK="2")  # would notice by its next collective
    time.sleep(0.5)
    peer.kill()
    peer.wait()
    assert waiting.wait(20) == 6
    assert training.poll() is None
    training.kill()


@pytest.mark.parametrize(("how", "code"), [("training", 5), ("starting", 6)])
def test_the_main_thread_handles_a_signal_if_it_can(how, code):
    process, _ = started(how, WORLD_SIZE="2")
    process.terminate()
    assert process.wait(10) == code


def test_the_command_above_the_host_process_of_deepspeed_counts(tmp_path):
    script = tmp_path / "deepspeed"
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    probe = "from eve_ds.launcher_watch import *; found = launcher_processes(); print(len(found), still_above(found))"
    found = [
        subprocess.run([*above, SHELL, probe], capture_output=True, text=True, check=True).stdout.strip()
        for above in ([script], [sys.executable, "-c", SHELL])
    ]
    assert found == ["2 True", "1 True"]


@pytest.mark.parametrize(("first_process", "gone"), [(b"/sbin/init", True), (b"python3\0/usr/bin/torchrun", False)])
def test_a_launcher_that_ended_before_the_watch_began_is_noticed(monkeypatch, first_process, gone):
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: first_process)
    assert still_above(launcher_processes()) != gone


def test_another_parent_is_not_the_launcher():
    assert still_above(launcher_processes())
    assert not still_above([1 if os.getppid() != 1 else 2])
    assert not still_above([os.getppid(), -1])


def test_the_thread_ends_with_its_context():
    with StopSignals() as stop, LauncherWatch(stop, 4, 6, {}) as watch:
        assert watch.is_alive()
    assert not watch.is_alive()
    with pytest.raises(Stopped), StopSignals() as stop, LauncherWatch(stop, 4, 6, {}) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
    assert not watch.is_alive()
