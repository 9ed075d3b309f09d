"""Order of the stream: complete epochs, mixture shares, and positions that fit other numbers of ranks and workers."""

import dataclasses
import json
from collections import Counter
from itertools import islice

import pytest

from eve_ds.config import ConfigError
from eve_ds.data.order import Lanes, Position, StreamOrder, lanes_for, merge_positions, mixture_quotas

SIZES = [7, 1, 30, 12, 3]
LANES = Lanes(8, 2)


def make_order(shard_sizes=(SIZES,), weights=(1.0,), lanes=LANES, window=5, seed=0):
    return StreamOrder(shard_sizes, weights, lanes, window, seed)


@pytest.mark.parametrize("lanes", [Lanes(1, 1), Lanes(8, 2), Lanes(64, 1), Lanes(3, 7), Lanes(64, 32)])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_consecutive_slots_of_an_epoch_hold_every_sample_once(lanes, window):
    order = make_order(lanes=lanes, window=window)
    everything = Counter((shard, number) for shard, size in enumerate(SIZES) for number in range(size))
    for epoch in range(4):
        places = [order.locate(slot) for slot in range(epoch * 53, (epoch + 1) * 53)]
        assert {place.epoch for place in places} == {epoch}
        assert Counter((place.shard, place.number) for place in places) == everything


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1, 1]])
def test_epochs_are_complete_with_fewer_samples_than_lanes(sizes):
    order = make_order([sizes], lanes=Lanes(64, 1))
    total = sum(sizes)
    for epoch in range(5):
        places = [order.locate(slot) for slot in range(epoch * total, (epoch + 1) * total)]
        assert {place.epoch for place in places} == {epoch}
        assert len({(place.shard, place.number) for place in places}) == total


def test_epochs_and_seeds_have_different_orders():
    def sequence(order, epoch):
        places = [order.locate(slot) for slot in range(epoch * 53, (epoch + 1) * 53)]
        return [(place.shard, place.number) for place in places]

    assert sequence(make_order(), 0) != sequence(make_order(), 1)
    assert sequence(make_order(), 0) != sequence(make_order(seed=1), 0)
    assert sequence(make_order(), 0) == sequence(make_order(), 0)


def test_place_of_a_slot_does_not_depend_on_earlier_calls():
    asked_in_order = [make_order().locate(slot) for slot in range(300)]
    assert [place.slot for place in asked_in_order] == list(range(300))
    order = make_order()
    assert [order.locate(slot) for slot in reversed(range(300))] == asked_in_order[::-1]


def test_a_lane_reads_its_shards_sequentially():
    """Ranks with different lanes open disjoint sets of shards; a lane has few shards open at a time."""
    sizes = [100] * 64
    order = make_order([sizes], lanes=Lanes(8, 1), window=50)
    for lane in range(8):
        shards = [order.locate(slot).shard for slot in range(lane, 6400, 8)]
        assert len(set(shards)) in (8, 9)
        for start in range(0, 800, 50):
            assert len(set(shards[start : start + 50])) <= 2


def test_mixture_follows_the_weights_and_completes_epochs_of_every_source():
    sizes = [[40, 60], [30], [8, 9]]
    order = make_order(sizes, (6.0, 3.0, 1.0), Lanes(8, 4))
    block = 8 * 1024
    places = [order.locate(slot) for slot in range(2 * block)]
    for half in (places[:block], places[block:]):
        shares = Counter(place.source for place in half)
        assert [shares[source] / block for source in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=1 / 1024)
    for source, source_sizes in enumerate(sizes):
        epochs = {}
        for place in places:
            if place.source == source:
                epochs.setdefault(place.epoch, Counter())[place.shard, place.number] += 1
        assert set(epochs) == set(range(max(epochs) + 1))
        whole = Counter((shard, number) for shard, size in enumerate(source_sizes) for number in range(size))
        finished = [epoch for epoch, seen in epochs.items() if seen == whole]
        assert len(finished) >= len(epochs) - max(1, block // sum(source_sizes))
        assert all(seen <= whole for seen in epochs.values()), "no sample may occur twice in an epoch"


def test_batches_contain_all_sources():
    order = make_order([[1000], [1000]], (1.0, 1.0), Lanes(64, 1))
    shares = [sum(order.locate(slot).source for slot in range(start, start + 64)) / 64 for start in range(0, 6400, 64)]
    assert sum(0.25 < share < 0.75 for share in shares) >= 98


def test_quotas_fill_the_block_and_give_every_source_a_slot():
    assert mixture_quotas([1.0], 32) == [32]
    assert sorted(mixture_quotas([1.0, 1.0, 1.0], 1024)) == [341, 341, 342]
    assert mixture_quotas([1e6, 1.0], 1024) == [1023, 1]
    assert mixture_quotas([1.0, 1e9, 1.0], 16) == [1, 14, 1]
    with pytest.raises(ConfigError, match=r"data.sources \(5\) must not be more than 4"):
        mixture_quotas([1.0] * 5, 4)


def test_lanes_divide_the_global_batch():
    assert lanes_for(64) == (64, 1)
    assert lanes_for(2048) == (64, 32)
    assert lanes_for(20) == (20, 1)
    assert lanes_for(67) == (1, 67)
    assert lanes_for(96) == (48, 2)


def serve(position, count, holes=frozenset()):
    """Take `count` batches as the loader does, skip the slots in `holes`; return served slots and the new position."""
    streams = [enumerate(position.slots(w), start=position.consumed[w] + 1) for w in range(position.num_workers)]
    served = []
    for _ in range(count):
        worker, batch = position.next_worker, []
        for consumed, slot in streams[worker]:
            if slot not in holes:
                batch.append(slot)
            if len(batch) == position.batch:
                position = position.advance(worker, consumed)
                break
        served.append(batch)
    return served, position


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_hold_consecutive_slots_for_all_numbers_of_ranks_and_workers(world_size, num_workers):
    batch = 16 // world_size
    ranks = [serve(Position(rank, world_size, batch, num_workers), 5)[0] for rank in range(world_size)]
    for step in range(5):
        assert sorted(slot for served in ranks for slot in served[step]) == list(range(16 * step, 16 * (step + 1)))


HOLES = frozenset(range(3, 400, 7)) | frozenset(range(40, 60))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_saved_position_resumes_at_the_next_slot(num_workers):
    start = Position(1, 2, 4, num_workers)
    whole, _ = serve(start, 20, HOLES)
    first, saved = serve(start, 7, HOLES)
    restored = json.loads(json.dumps(dataclasses.asdict(saved)))
    rest, _ = serve(Position(**restored), 13, HOLES)
    assert first + rest == whole


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (4, 2)])
def test_another_worker_count_serves_the_same_slots(before, after):
    first, saved = serve(Position(1, 2, 4, before), 7, HOLES)
    again, saved = serve(saved.split(after), 5, HOLES)
    rest, _ = serve(saved.split(before), 12, HOLES)
    served = [slot for batch in first + again + rest for slot in batch]
    mine = [slot for slot in islice(Position(1, 2, 4, 1).slots(0), 400) if slot not in HOLES]
    assert len(served) == len(set(served))
    complete = 80  # later batches are still in progress in other workers
    assert set(mine[:complete]) <= set(served) <= set(mine[:140])


@pytest.mark.parametrize(("old", "new"), [((1, 8), (4, 2)), ((4, 2), (1, 8)), ((3, 4), (2, 6)), ((2, 5), (2, 3))])
def test_another_world_size_serves_the_remaining_slots_once(old, new):
    served, saved = [], []
    for rank in range(old[0]):
        batches, position = serve(Position(rank, *old, 2), 6 + rank % 2, HOLES)
        served += [slot for batch in batches for slot in batch]
        saved.append(position)
    for position in merge_positions(saved, *new, num_workers=3):
        served += [slot for batch in serve(position, 12, HOLES)[0] for slot in batch]
    assert len(served) == len(set(served))
    assert set(served).isdisjoint(HOLES)
    assert set(range(100)) - HOLES <= set(served)


def test_merged_positions_can_be_merged_again():
    positions = [Position(rank, 2, 4, 2) for rank in range(2)]
    served = []
    for world_size, batch, workers in [(3, 2, 1), (1, 6, 2), (2, 4, 2)]:
        results = [serve(position, 5, HOLES) for position in positions]
        served += [slot for batches, _ in results for one in batches for slot in one]
        positions = merge_positions([position for _, position in results], world_size, batch, workers)
    for position in positions:
        served += [slot for one in serve(position, 5, HOLES)[0] for slot in one]
    assert len(served) == len(set(served))
    assert set(range(80)) - HOLES <= set(served)


def test_size_of_a_position_is_bounded():
    _, position = serve(Position(0, 1, 4, 2), 5000)
    _, position = serve(position.split(3), 1000)
    assert len(position.split(1).pending) <= 3 * 4
