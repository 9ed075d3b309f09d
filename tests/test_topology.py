"""Place of each rank in the topology, and its share of the data."""

import pytest

from eve_ds.topology import Topology


def test_a_process_without_a_group_has_the_default_topology():
    alone = Topology.current()
    assert (alone.data_rank, alone.data_size, alone.expert_rank, alone.tensor_rank) == (0, 1, 0, 0)


@pytest.mark.parametrize(("world_size", "ep_size", "tp_size"), [(8, 2, 1), (8, 2, 2), (12, 3, 2), (4, 1, 4)])
def test_each_combination_of_places_occurs_once(world_size, ep_size, tp_size):
    places = [Topology(rank, world_size, ep_size, tp_size) for rank in range(world_size)]
    found = [(place.expert_replica, place.expert_rank, place.tensor_rank) for place in places]
    expected = [
        (replica, expert, tensor)
        for replica in range(world_size // ep_size // tp_size)
        for expert in range(ep_size)
        for tensor in range(tp_size)
    ]
    assert found == expected
    assert all(place.num_expert_replicas == world_size // ep_size // tp_size for place in places)


def test_tensor_parallel_ranks_share_their_data():
    places = [Topology(rank, 8, ep_size=2, tp_size=2) for rank in range(8)]
    assert [place.data_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {place.data_size for place in places} == {4}


@pytest.mark.parametrize(("world_size", "ep_size", "tp_size"), [(4, 2, 1), (8, 2, 2), (12, 3, 2), (4, 1, 4)])
def test_an_expert_group_has_the_ranks_with_one_replica_and_one_tensor_rank(world_size, ep_size, tp_size):
    places = [Topology(rank, world_size, ep_size, tp_size) for rank in range(world_size)]
    groups = {}
    for place in places:
        groups.setdefault((place.expert_replica, place.tensor_rank), []).append(place.rank)
    assert all(place.expert_groups == sorted(groups.values(), key=min) for place in places)
    for place in places:
        group = groups[place.expert_replica, place.tensor_rank]
        assert list(place.expert_peers) == [places[rank].data_rank for rank in group]
