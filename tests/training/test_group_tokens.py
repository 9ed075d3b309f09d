"""Numbers of tokens that ranks tell each other in the sum that starts a step."""

from types import SimpleNamespace

import pytest

from eve_ds.topology import Topology
from eve_ds.training.group_tokens import GroupTokens

VIEWS = ("mim", "mlm")


def batch(rank, step, views=VIEWS):
    """A batch of which only the numbers of tokens are known."""
    layouts = {view: SimpleNamespace(num_tokens=100 * rank + 10 * step + place) for place, view in enumerate(views)}
    return SimpleNamespace(layouts=layouts)


def summed(topologies, views=VIEWS, micro_steps=2):
    """For each rank what it knows of its group after the sum."""
    counters = [GroupTokens(views, topology, micro_steps) for topology in topologies]
    vectors = [
        counter.own([batch(topology.data_rank, step) for step in range(micro_steps)])
        for counter, topology in zip(counters, topologies, strict=True)
    ]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    return [counter.of_group(total) for counter in counters]


@pytest.mark.parametrize(("ep_size", "tp_size"), [(4, 1), (2, 1), (2, 2), (1, 1)])
def test_every_rank_learns_the_tokens_of_the_ranks_that_share_its_experts(ep_size, tp_size):
    topologies = [Topology(rank, 4 * tp_size, ep_size, tp_size) for rank in range(4 * tp_size)]
    for topology, found in zip(topologies, summed(topologies), strict=True):
        first = topology.data_rank // ep_size * ep_size
        expected = [
            {view: tuple(100 * rank + 10 * step + place for rank in range(first, first + ep_size))}
            for step in range(2)
            for place, view in enumerate(VIEWS)
        ]
        assert found == [expected[0] | expected[1], expected[2] | expected[3]]


def test_a_view_that_a_batch_lacks_has_no_tokens_and_a_rank_without_data_adds_nothing():
    topologies = [Topology(rank, 2, 2) for rank in range(2)]
    counters = [GroupTokens((*VIEWS, "itc_text"), topology, 1) for topology in topologies]
    vectors = [counters[0].own([batch(0, 0)]), counters[1].own([])]
    assert counters[1].of_group(vectors[0]) == [{"mim": (0, 0), "mlm": (1, 0), "itc_text": (0, 0)}]
    assert vectors[1] == [0.0] * 6


def test_without_views_nothing_is_sent():
    counter = GroupTokens((), Topology(1, 2, 2), 3)
    assert counter.own([batch(0, step) for step in range(3)]) == []
    assert counter.of_group([]) == [{}, {}, {}]
