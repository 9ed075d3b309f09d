"""Data of a step on tensor-parallel ranks, which share their samples; seen from one rank whose peer sends nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from eve_ds.data.errors import UnusableData
from eve_ds.signals import StopSignals
from eve_ds.topology import Topology
from eve_ds.training.feed import Feed
from eve_ds.training.job import Loading


class Job:
    """Endless batches of one sample."""

    config = SimpleNamespace(data=SimpleNamespace(num_workers=0))
    exchanged_views = ()

    def open(self, loading):
        return self

    def __next__(self):
        return SimpleNamespace(keys=["a"], tensors=list, to=lambda *_args, **_options: None)

    def state_dict(self):
        return {"position": 1}

    def counts(self, micro_batches):
        return {"words": 3.0 * len(micro_batches)}

    def check_step(self, totals, samples):
        self.totals = totals


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def feed_of(topology, group):
    return Feed(Job(), Loading(topology, 1, 0, None, False, group), 1, torch.device("cpu"), StopSignals())


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_that_differ_between_tensor_parallel_ranks_end_the_run(group, rank):
    feed = feed_of(Topology(rank=rank, world_size=2, tp_size=2), group)
    with pytest.raises(UnusableData, match="tensor-parallel ranks have read different samples: some could not be read"):
        feed.take(0)


def test_shared_samples_count_once(group, monkeypatch):
    monkeypatch.setattr(Feed, "_checksum", lambda self, micro_batches: 0)
    for rank, words in ((0, 3.0), (1, 0.0)):
        feed = feed_of(Topology(rank=rank, world_size=2, tp_size=2), group)
        assert feed.take(0).totals == {"words": words}


def test_checksums_of_equal_samples_cancel(group):
    feeds = [feed_of(Topology(rank=rank, world_size=6, tp_size=3), group) for rank in range(6)]
    batches = [[SimpleNamespace(keys=[f"key-{rank // 3}"])] for rank in range(6)]
    sums = [feed._checksum(batch) for feed, batch in zip(feeds, batches, strict=True)]
    assert sum(sums) == 0
    assert all(sums)
