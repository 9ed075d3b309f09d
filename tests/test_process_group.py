"""Joining and leaving the process group, and what is refused before."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from eve_ds.launch_environment import LaunchError
from eve_ds.process_group import check_accelerator, initialize_process_group

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs threads of Linux that run only while others sleep")
def test_process_ends_well_while_gloo_still_drops_its_tensors():
    """Without the wait, about two thirds of such processes aborted, although they had destroyed the group."""
    code = """
import gc, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from eve_ds.process_group import initialize_process_group

def work():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    initialize_process_group("gloo")
    held.append(dist.group.WORLD)  # as DeepSpeed's modules hold it
    time.sleep(0.05)  # the threads name themselves, and wait for work
    tasks = [task for task in Path("/proc/self/task").iterdir() if "gloo_runloop" in (task / "comm").read_text()]
    for task in tasks:
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    dist.all_reduce(torch.ones(10))
    gc.freeze()

held = []
torch.set_num_threads(1)
for _ in range(20):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    clean = {name: value for name, value in os.environ.items() if name not in TORCH and not name.startswith("SLURM_")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.split() == ["0"] * 20, run.stderr[-2000:]


def test_two_worlds_of_one_need_no_port():
    code = """
import torch.distributed as dist
from eve_ds.distributed import all_reduce_sum, broadcast_object
from eve_ds.process_group import initialize_process_group
import torch, os
info = initialize_process_group()
assert (info.world_size, dist.get_world_size(), info.launcher) == (1, 1, "single")
assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0 and broadcast_object("x") == "x"
assert dist.get_world_size(dist.new_group([0])) == 1
"""
    clean = {name: value for name, value in os.environ.items() if name not in TORCH and not name.startswith("SLURM_")}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=clean) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]


def test_too_few_devices_for_the_local_rank_is_refused(monkeypatch):
    for name, value in TORCH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match=r"local rank \(1\) must be below the number of CUDA devices .* \(1\).*gpus"):
        initialize_process_group("nccl")


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in (TORCH | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(LaunchError, match=r"^MASTER_PORT \(\d+\) is in use on this host.*choose another one"):
            initialize_process_group("gloo", timedelta(seconds=2))


@pytest.mark.parametrize(
    ("own", "local_size", "master", "interface", "refused"),
    [
        ("127.0.1.1", "2", "10.0.0.1", None, True),
        (None, "2", "10.0.0.1", None, True),  # gloo takes the loopback interface for a name without an address
        ("127.0.1.1", "2", "10.0.0.1", "lo", False),
        ("127.0.1.1", "8", "10.0.0.1", None, False),  # one host
        ("127.0.1.1", "2", "127.0.0.2", None, False),  # several "hosts" on one machine
        ("10.0.0.2", "2", "10.0.0.1", None, False),
    ],
)
def test_a_host_under_a_loopback_address_is_refused(monkeypatch, own, local_size, master, interface, refused):
    def resolve(name):
        address = own if name == "this-host" else master
        if address is None:
            raise socket.gaierror
        return address

    joined = []
    monkeypatch.setattr(socket, "gethostname", lambda: "this-host")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: joined.append(True))
    for name, value in (TORCH | {"LOCAL_WORLD_SIZE": local_size, "MASTER_ADDR": master}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    if refused:
        with pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME is not set.*\(this-host\).*network interface"):
            initialize_process_group("gloo")
    else:
        initialize_process_group("gloo")
    assert joined == ([] if refused else [True])


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "cuda:0", "xyz", "cuda"])
def test_an_accelerator_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator()
    monkeypatch.delenv("DS_ACCELERATOR")
    check_accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(LaunchError, match=rf"^DS_ACCELERATOR \('?{name}'?\) .*: set .*, or unset it$"):
        check_accelerator()


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize("names", ["eth99", "lo,eth99", "Lo", "127.0.0.1"])
def test_an_interface_that_the_host_lacks_is_refused(monkeypatch, names, world_size):
    for name, value in (TORCH | {"RANK": "0", "WORLD_SIZE": world_size, "GLOO_SOCKET_IFNAME": names}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        LaunchError, match=r"^GLOO_SOCKET_IFNAME \(\S+\) is no network interface of this host: name .*lo"
    ):
        initialize_process_group("gloo")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Ping failed, invalid value returned from server. Expected: 1, Got: 2\nframe #0", LaunchError),
        (
            "The server socket has failed to listen on any local network address. port: 80, code: -13, EACCES",
            LaunchError,
        ),
        ("The client socket has timed out after 3000ms while trying to connect to (a, 1).", dist.DistNetworkError),
        ("recvValue failed: Connection reset by peer", dist.DistNetworkError),
    ],
)
def test_a_master_that_cannot_be_joined_is_named(monkeypatch, caplog, text, kind):
    def refuse(*_, **__):
        raise dist.DistNetworkError(text)

    monkeypatch.setattr(dist, "init_process_group", refuse)
    for name, value in (TORCH | {"MASTER_ADDR": "master.invalid"}).items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("WARNING", "eve_ds"), pytest.raises(kind) as caught:
        initialize_process_group("gloo")
    assert "MASTER_ADDR (master.invalid) has no address on this host (" in caplog.text
    if kind is LaunchError:
        start, end = "MASTER_ADDR (master.invalid) cannot be reached at MASTER_PORT (", "that no other program uses"
        assert str(caught.value).startswith(start)
        assert str(caught.value).endswith(end)
        assert "\n" not in str(caught.value)
