"""Group timeouts, collectives, seeds, rank-0 log."""

import io
import logging
import os
import random
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from eve_ds.distributed import (
    DEFAULT_TIMEOUT,
    RankLostError,
    all_reduce_sum,
    broadcast_object,
    check_accelerator,
    get_logger,
    initialize_process_group,
    rank_losses,
    rank_zero,
    seed_everything,
    set_group_timeout,
)
from eve_ds.launch_environment import LaunchError

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def test_functions_work_in_a_world_of_one_without_a_group():
    assert not dist.is_initialized()
    assert rank_zero()
    values = torch.tensor([1.0, 2.0])
    total = all_reduce_sum(values)
    total += 1
    assert torch.equal(values, torch.tensor([1.0, 2.0]))
    assert broadcast_object({"step": 3}) == {"step": 3}


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs threads of Linux that run only while others sleep")
def test_process_ends_well_while_gloo_still_drops_its_tensors():
    """Without the wait, about two thirds of such processes aborted, although they had destroyed the group."""
    code = """
import gc, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from eve_ds import distributed

def work():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    distributed.initialize_process_group("gloo")
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
from eve_ds.distributed import initialize_process_group, all_reduce_sum, broadcast_object
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


def test_random_numbers_repeat_and_differ_by_seed_and_rank():
    def draws(seed, rank):
        seed_everything(seed, rank)
        return random.random(), torch.rand(()).item()

    state = torch.get_rng_state()
    assert draws(3, 1) == draws(3, 1)
    # The last seed has more than 44 bits, which leave no room for the rank in torch's 64.
    pairs = [(seed, rank) for seed in (0, 1, 2, 3, 20_000_000_000_000) for rank in range(4)]
    assert len({draws(*pair) for pair in pairs}) == len(pairs)
    torch.set_rng_state(state)


def test_rank_zero_logs_everything_and_other_ranks_log_warnings_with_their_rank(monkeypatch, capsys):
    logger = get_logger()
    assert get_logger() is logger
    logger.info("from rank 0")
    logging.getLogger("eve_ds.data").info("from a module")
    monkeypatch.setenv("RANK", "3")
    logger.info("not shown")
    logger.warning("shown")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" INFO ")[2] for line in lines[:2]] == ["from rank 0", "from a module"]
    assert len(lines) == 3
    assert lines[2].startswith("[rank 3]")
    assert lines[2].endswith("WARNING shown")


def test_log_shows_information_after_another_package_reset_the_level(capsys):
    get_logger().setLevel(logging.NOTSET)
    get_logger().info("still shown")
    assert capsys.readouterr().err.endswith("INFO still shown\n")


def test_log_writes_to_the_current_standard_error(monkeypatch):
    for message in ("first", "second"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        get_logger().info(message)
        assert stream.getvalue().endswith(f"{message}\n")
        stream.close()


# ------------------------------------------------------------------------------------------ ranks that do not answer

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError(f"{GLOO}/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"),
            "another rank did not answer within 600 s (train.timeout_seconds; waited in",
        ),
        (dist.DistStoreError("Timed out after 4 seconds waiting for clients. 1/2 clients joined."), "within 4 s"),
        (
            dist.DistNetworkError("The client socket has timed out after 3000ms while trying to connect to (a, 1)."),
            "within 3 s",
        ),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"), "within 300 s"),
        (RuntimeError(f"{GLOO}/pair.cc:537] Read error [::1]:1: Connection reset by peer."), "another rank has ended"),
        (RuntimeError(f"{GLOO}/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "another rank has ended"),
        (RuntimeError("Application timeout caused pair closure"), "another rank has ended"),
    ],
)
def test_errors_about_another_rank_become_one_line(error, text):
    with pytest.raises(RankLostError) as caught, rank_losses("train.timeout_seconds"):
        raise error
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), RuntimeError("Timed out after 5 seconds"), ValueError("gloo")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, rank_losses():
        raise error
    assert caught.value is error


def test_a_rank_whose_peers_never_start_names_the_setting_and_the_place(free_port):
    code = (
        "from datetime import timedelta; from eve_ds.distributed import *\n"
        "with rank_losses('x.timeout'): initialize_process_group('gloo', timedelta(seconds=1))"
    )
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | world, capture_output=True, text=True, check=False
    )
    assert re.search(r"RankLostError: another rank did not answer within \d s \(x\.timeout; waited in ", done.stderr)


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


def collectives_and_timeouts(rank, world_size, port):
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    info = initialize_process_group(timeout=timedelta(seconds=40))
    total = all_reduce_sum(torch.tensor([rank + 1, 10], dtype=torch.int64))
    sent = broadcast_object({"from": rank}, source=1)
    set_group_timeout(timedelta(seconds=2))
    group = dist.new_group([0, 1])  # without a timeout, as DeepSpeed creates its groups
    waited = None
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=group)
        waited = time.monotonic() - started
    else:
        time.sleep(5)
    return (info.rank, info.world_size, info.launcher), total, sent, rank_zero(), waited


def test_collectives_and_timeout_of_later_groups(run_ranks, free_port):
    assert timedelta(minutes=1) < DEFAULT_TIMEOUT
    first, second = run_ranks(collectives_and_timeouts, 2, free_port, timeout=60)
    assert (first[0], second[0]) == ((0, 2, "torch"), (1, 2, "torch"))
    for result in (first, second):
        assert torch.equal(result[1], torch.tensor([3, 20]))
        assert result[2] == {"from": 1}
    assert (first[3], second[3]) == (True, False)
    assert 1.5 < first[4] < 4.5, "the group's own timeout is 2 s; torch's default would wait 30 minutes"
