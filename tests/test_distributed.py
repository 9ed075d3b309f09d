"""Group timeouts, collectives, seeds, rank-0 log."""

import io
import logging
import os
import random
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from eve_ds.distributed import (
    DEFAULT_TIMEOUT,
    all_reduce_sum,
    broadcast_object,
    get_logger,
    initialize_process_group,
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


def test_log_writes_to_the_current_standard_error(monkeypatch):
    for message in ("first", "second"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        get_logger().info(message)
        assert stream.getvalue().endswith(f"{message}\n")
        stream.close()


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
