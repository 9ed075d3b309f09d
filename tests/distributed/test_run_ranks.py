"""The fixture `run_ranks` returns results in rank order, shows the traceback of an error, and ends hanging ranks."""

import time

import pytest
import torch
import torch.distributed as dist


def scaled_sums(rank, world_size, scales):
    sums = []
    for scale in scales:
        value = torch.full((2,), float(rank + 1)) * scale
        dist.all_reduce(value)
        sums.append(value)
    return rank, sums


def fail_on_last_rank(rank, world_size):
    if rank == world_size - 1:
        raise ValueError(f"told to fail on rank {rank}")
    dist.barrier()


def hang_on_rank_zero(rank, world_size):
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def test_results_come_in_rank_order_from_one_start_with_many_cases(run_ranks):
    results = run_ranks(scaled_sums, 2, [1.0, 10.0], timeout=60)
    assert [rank for rank, _ in results] == [0, 1]
    for _, (once, tenfold) in results:
        assert torch.equal(once, torch.tensor([3.0, 3.0]))
        assert torch.equal(tenfold, torch.tensor([30.0, 30.0]))


def test_an_error_fails_the_test_with_the_rank_traceback(run_ranks):
    with pytest.raises(pytest.fail.Exception, match="told to fail on rank 1") as caught:
        run_ranks(fail_on_last_rank, 2, timeout=60)
    assert "in fail_on_last_rank" in str(caught.value)


def test_a_hanging_rank_is_killed_and_its_stack_is_shown(run_ranks):
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="in hang_on_rank_zero"):
        run_ranks(hang_on_rank_zero, 2, timeout=8)
    assert time.monotonic() - started < 30
