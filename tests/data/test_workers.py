"""Worker processes of loaders: signals that stop a run leave them to it, and they end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from numbers_dataset import Numbers

from eve_ds.data.workers import start_loader
from eve_ds.signals import STOP_SIGNALS

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def ended(process, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_signals_to_a_worker_change_nothing(method):
    stream = start_loader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context=method)
    worker = int(next(stream)[1])
    for number in STOP_SIGNALS:  # from another process, as a launcher sends them
        subprocess.run(["kill", f"-{number.value}", str(worker)], check=True)
    time.sleep(0.2)
    assert [int(next(stream)[0]) for _ in range(20)] == list(range(1, 21))
    assert not ended(worker, 0.1)
    del stream
    assert ended(worker, 1)


def test_a_worker_that_hangs_ends_by_its_parent():
    stream = start_loader(Numbers(end=1), batch_size=None, num_workers=1, multiprocessing_context="fork")
    worker = int(next(stream)[1])
    os.kill(worker, signal.SIGTERM)
    assert ended(worker, 2)


def test_a_worker_ends_with_its_killed_parent():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from numbers_dataset import Numbers; "
        "from eve_ds.data.workers import start_loader; "
        "stream = start_loader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context='fork'); "
        "print(int(next(stream)[1]), flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(SUPPORT)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert ended(worker, 2)  # torch alone looks every five seconds, during which peers wait for the parent


def test_this_process_receives_signals_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = start_loader(Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    del stream
