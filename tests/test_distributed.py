"""Collectives, group timeouts and seeds."""

import os
import random
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from eve_ds.distributed import all_reduce_sum, broadcast_object, rank_zero, seed_everything
from eve_ds.process_group import DEFAULT_TIMEOUT, initialize_process_group, set_group_timeout


def test_functions_work_in_a_world_of_one_without_a_group():
    assert not dist.is_initialized()
    assert rank_zero()
    values = torch.tensor([1.0, 2.0])
    total = all_reduce_sum(values)
    total += 1
    assert torch.equal(values, torch.tensor([1.0, 2.0]))
    assert broadcast_object({"step": 3}) == {"step": 3}


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
