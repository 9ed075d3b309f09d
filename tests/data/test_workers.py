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
from eve_ds.resources import lack
from eve_ds.signals import STOP_SIGNALS

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def ended(process, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


IMPORTS = "eve_ds.data.pipeline"  # as elsewhere: the fork server of this process imports once
METHODS = ["fork", "forkserver", "spawn"]


def start(method, end=1 << 30):
    return start_loader(Numbers(end), 1, IMPORTS, method, batch_size=None)


@pytest.mark.parametrize("method", METHODS)
def test_signals_to_a_worker_change_nothing(method):
    stream = start(method)
    worker = int(next(stream)[1])
    for number in STOP_SIGNALS:  # from another process, as a launcher sends them
        subprocess.run(["kill", f"-{number.value}", str(worker)], check=True)
    time.sleep(0.2)
    assert [int(next(stream)[0]) for _ in range(20)] == list(range(1, 21))
    assert not ended(worker, 0.1)
    del stream
    assert ended(worker, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_hangs_ends_by_its_parent(method):
    stream = start(method, end=1)
    worker = int(next(stream)[1])
    os.kill(worker, signal.SIGTERM)
    assert ended(worker, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_the_system_kills_is_named(monkeypatch, method):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    stream = start(method, end=1)
    os.kill(int(next(stream)[1]), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        next(stream)
    assert lack(caught.value).startswith("a worker process of the data loader ended (DataLoader worker (pid")


PARENT = """
import multiprocessing, sys, time
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from numbers_dataset import Numbers
    from eve_ds.data.workers import start_loader
    stream = start_loader(Numbers(), 2, "numbers_dataset", sys.argv[2], batch_size=None)
    print(*{int(next(stream)[1]) for _ in range(2)}, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_end_with_their_killed_parent(tmp_path, method):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(SUPPORT), method]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = {int(worker) for worker in parent.stdout.readline().split()}
    helpers = {process.pid for process in psutil.Process(parent.pid).children(recursive=True)}
    assert len(workers) == 2
    assert len(helpers - workers) == {"fork": 0, "forkserver": 2, "spawn": 1}[method]
    parent.kill()
    parent.wait()
    assert all(ended(process, 2) for process in workers | helpers)  # torch alone looks every five seconds


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_to_the_fork_server_change_nothing(name):
    stream = start("forkserver")
    first = int(next(stream)[1])
    server = psutil.Process(first).parent()
    assert server.ppid() == os.getpid()
    subprocess.run(["kill", f"-{name[3:]}", str(server.pid)], check=True)
    assert not ended(server.pid, 0.2)
    second = start("forkserver")
    assert psutil.Process(int(next(second)[1])).parent() == server
    assert int(next(stream)[1]) == first


def test_this_process_receives_signals_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = start("fork")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    del stream
