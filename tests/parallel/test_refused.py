"""Topologies that are refused before anything is built."""

import pytest

from eve_ds.config import ConfigError
from eve_ds.parallel.refused import check_topology

TOPOLOGY = {"world_size": 4, "num_experts": 8, "ep_size": 2, "zero_stage": 1, "clip_grad_norm": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ep_size": 1},
        {"ep_size": 4, "zero_stage": 2},
        {"zero_stage": 0, "clip_grad_norm": 0.0},
        {"zero_stage": 0, "ep_size": 1},
        {"overlap": 4},
        {"overlap": 9, "ep_size": 1},
        {"zero_stage": 3},
    ],
)
def test_valid_topologies_are_accepted(change):
    check_topology(**TOPOLOGY | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"num_experts": 6, "ep_size": 4},
            r"model\.moe\.num_experts \(6\) must be divisible by parallel\.ep_size \(4\).*one of 1, 2, 3, 6 as ep_size",
        ),
        (
            {"world_size": 6, "ep_size": 4},
            r"number of ranks \(6\) must be divisible by parallel\.ep_size \(4\).*start a multiple of 4 ranks, or "
            r"take one of 1, 2 as ep_size",
        ),
        (
            {"overlap": 5},
            r"parallel\.overlap \(5\) must be at most the number of experts of a rank \(4\), model\.moe\.num_experts "
            r"\(8\) / parallel\.ep_size \(2\), .*take fewer parts, or a smaller ep_size",
        ),
        (
            {"zero_stage": 0},
            r"clip_grad_norm \(1\) cannot be used with zero_optimization\.stage 0 and parallel\.ep_size \(2\).*"
            r"average of the ranks' gradient norms.*use a higher stage, where it is, or clip_grad_norm=0",
        ),
    ],
)
def test_topologies_that_fail_or_give_other_results_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        check_topology(**TOPOLOGY | change)
