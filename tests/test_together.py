"""A failure on one rank, of an action or of the data, ends all ranks; none waits for a rank that has failed."""

import threading
from types import SimpleNamespace

import pytest

from eve_ds.data.errors import UnusableData


class Failing:
    """Job and batches that fail with the given error."""

    config = SimpleNamespace(data=SimpleNamespace(num_workers=0))
    exchanged_views = ()

    def __init__(self, error):
        self.error = error

    def open(self, loading):
        return self

    def __next__(self):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(tensors=list, to=lambda *_args, **_options: None)

    def state_dict(self):
        return {}

    def counts(self, micro_batches):
        return {"samples": float(len(micro_batches))}

    def check_step(self, totals, samples):
        pass


class Late(Failing):
    """Job and batches that come once they are released, or fail."""

    def __init__(self, error, comes):
        super().__init__(error)
        self.released = threading.Event()
        if comes:
            self.released.set()

    def __next__(self):
        self.released.wait(20)
        return super().__next__()


LATE = {
    # name: for each rank whether its data come, its error, and whether a signal comes to it while it waits
    "no rank waits": [(True, None, True), (True, None, False)],
    "the rank with the signal waits": [(False, None, True), (True, None, False)],
    "another rank waits": [(True, None, True), (False, None, False)],
    "both wait, one has the signal": [(False, None, False), (False, None, True)],
    "both wait and have the signal": [(False, None, True), (False, None, True)],
    "one waits, one fails": [(False, None, False), (True, UnusableData("no pair"), False)],
    "one waits, one fails and has the signal": [(True, UnusableData("no pair"), True), (False, None, False)],
}


def fetches(rank, loading):
    """For each row of LATE: the samples of all ranks, None if the data are given up, or the error."""
    import torch

    from eve_ds.signals import StopSignals
    from eve_ds.training.feed import Feed

    found = {}
    for name, ranks in LATE.items():
        comes, error, has_signal = ranks[rank]
        job, stop = Late(error, comes), StopSignals()
        feed = Feed(job, loading, 1, torch.device("cpu"), stop)
        signal = threading.Timer(0.1, setattr, (stop, "requested", has_signal))
        signal.start()
        try:
            data = feed.take(0)
            found[name] = None if data is None else data.totals["samples"]
        except UnusableData as error:
            found[name] = str(error)
        signal.join()
        job.released.set()
    return found


def outcomes(rank, world_size, folder):
    """Return what ranks raise together, and what they get from a feed."""
    import torch.distributed as dist

    from eve_ds.topology import Topology
    from eve_ds.training import feed
    from eve_ds.training.job import Loading

    feed.WAIT_SECONDS = 0.2
    loading = Loading(Topology.current(), 1, 0, None, False, dist.new_group(backend="gloo"))
    return failures(rank, world_size, folder), fetches(rank, loading)


def failures(rank, world_size, folder):
    """Return type and text of what this rank raises, for each way in which a rank can fail."""
    import torch
    import torch.distributed as dist

    from eve_ds.checkpoint.files import CheckpointError
    from eve_ds.signals import StopSignals
    from eve_ds.together import from_rank_zero, on_every_rank, on_rank_zero
    from eve_ds.topology import Topology
    from eve_ds.training.feed import Feed
    from eve_ds.training.job import Loading

    group = dist.new_group(backend="gloo")
    loading = Loading(Topology.current(), 1, 0, None, False, group)
    written, sent = [], []

    def fail(*errors):
        if rank < len(errors) and errors[rank] is not None:
            raise errors[rank]
        written.append(rank)

    def take(*errors):
        error = errors[rank]
        Feed(Failing(error), loading, 1, torch.device("cpu"), StopSignals()).take(0)

    full = OSError(28, "No space left on device", "/runs/a")
    found = []
    for action in (
        lambda: on_rank_zero(lambda: fail(CheckpointError("weights are not finite"))),
        lambda: on_every_rank(lambda: fail(None, full), group),
        lambda: on_every_rank(fail, group),
        lambda: take(None, UnusableData("no pair")),
        lambda: take(None, KeyError("txt")),
        lambda: take(UnusableData("no pair"), KeyError("txt")),
        lambda: from_rank_zero(lambda: fail(PermissionError(13, "Permission denied", "/data/a.tar")), group),
        lambda: from_rank_zero(lambda: fail(OSError(5, "Input/output error", "/data/a.tar")), group),
        lambda: sent.append(from_rank_zero(lambda: {"from": rank}, group)),
        lambda: sent.append(from_rank_zero(lambda: {"from": rank})),
    ):
        try:
            action()
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(None)
    return [*found, sent]


def test_a_failure_or_signal_of_one_rank_is_that_of_all(run_ranks, tmp_path):
    (first, *fetched), (second, *also_fetched) = run_ranks(outcomes, 2, str(tmp_path), timeout=60)
    assert first[0] == second[0] == ("ConfigError", "weights are not finite")
    assert first[1] == second[1] == ("SaveError", "rank 1: /runs/a: No space left on device")
    assert first[2] is second[2] is None
    assert first[3] == second[3] == ("UnusableData", "rank 1: no pair")
    assert (first[4], second[4]) == (("RuntimeError", "rank 1: KeyError: 'txt'"), ("KeyError", "'txt'"))
    both = "rank 0: no pair; rank 1: KeyError: 'txt'"
    assert (first[5], second[5]) == (("RuntimeError", both), ("KeyError", "'txt'"))
    assert first[6] == second[6] == ("ConfigError", "/data/a.tar cannot be used: Permission denied")
    assert first[7] == second[7] == ("SaveError", "/data/a.tar: Input/output error")
    assert first[8:] == second[8:] == [None, None, [{"from": 0}, {"from": 0}]]
    expected = dict.fromkeys(LATE) | {"no rank waits": 2.0, "one waits, one fails": "rank 1: no pair"}
    expected |= {"one waits, one fails and has the signal": "rank 0: no pair"}
    assert fetched == also_fetched == [expected]


def test_an_unforeseen_error_keeps_its_type():
    from eve_ds.together import on_rank_zero

    def action():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_rank_zero(action)
