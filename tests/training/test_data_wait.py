"""Waits for data: measured with slow sources, and the advised number of workers ends them in a simulation."""

import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from eve_ds.signals import StopSignals
from eve_ds.topology import Topology
from eve_ds.training import data_wait
from eve_ds.training import feed as feed_module
from eve_ds.training.data_wait import BLOCK_STEPS, BLOCKS, DataWait, Load, Waits, advice, spare_cores
from eve_ds.training.feed import Feed
from eve_ds.training.job import Loading

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def clock(monkeypatch):
    """Clock of the feed and its waits that only `sleep` advances."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    clock.thread_time = lambda: 0.0
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(data_wait, "time", clock)
    monkeypatch.setattr(feed_module, "time", clock)
    return clock


class SlowJob:
    """Job and batches that take some seconds for each micro-batch."""

    exchanged_views = ()

    def __init__(self, clock, seconds, num_workers=0):
        self.clock, self.seconds, self.read_seconds = clock, seconds, 0.0
        self.config = SimpleNamespace(data=SimpleNamespace(num_workers=num_workers))

    def open(self, loading):
        return self

    def __next__(self):
        self.clock.sleep(self.seconds)
        self.read_seconds += self.seconds
        return SimpleNamespace(tensors=list, to=lambda *_args, **_options: None)

    def state_dict(self):
        return {}

    def counts(self, micro_batches):
        return {}

    def check_step(self, totals, samples):
        pass


def loading(group):
    return Loading(Topology.current(), 4, 0, None, False, group)


def numbers_of_steps(feed, clock, steps, busy):
    """Take some steps as the training loop does, with a model that needs `busy` seconds for each."""
    started = clock.now
    for _ in range(steps):
        feed.take(0)
        clock.sleep(busy)
        feed.prepare()
    return feed.data_wait.numbers(steps, clock.now - started, 8, feed.batches.read_seconds)


def test_steps_of_a_slow_source_wait(group, clock, monkeypatch, caplog):
    """The step loads two micro-batches of 4 s; the model needs 2 s, so about four times as many workers would do."""
    monkeypatch.setattr(data_wait, "spare_cores", lambda group: 7)
    feed = Feed(SlowJob(clock, 4.0, num_workers=1), loading(group), 2, CPU, StopSignals())
    with caplog.at_level(logging.INFO):
        numbers = numbers_of_steps(feed, clock, BLOCK_STEPS, 2.0)
        for _ in range(BLOCKS):
            later = numbers_of_steps(feed, clock, BLOCK_STEPS, 2.0)
    assert later == pytest.approx(
        {"step_seconds": 10.0, "data_wait_seconds": 8.0, "samples_per_second_per_worker": 1.0}
    ), "of these steps alone"
    assert numbers["data_wait_seconds"] == pytest.approx(8.0)
    assert numbers["step_seconds"] == pytest.approx(10.0 + 8.0 / BLOCK_STEPS), "the first batches are no wait of a step"
    assert caplog.messages == [  # once, although the later steps wait as well
        "the first batches came after 8 s",
        "steps wait for data 77% of their time (8 of 10 s): data.num_workers=4 would do instead of 1, as a worker "
        "reads 0.952 samples/s and a rank could take 3.33",
    ]


def test_steps_of_a_fast_source_do_not_wait(group, clock, caplog):
    feed = Feed(SlowJob(clock, 0.4), loading(group), 1, CPU, StopSignals())
    with caplog.at_level(logging.WARNING):
        for _ in range(BLOCKS):
            numbers = numbers_of_steps(feed, clock, BLOCK_STEPS, 5.0)
    assert numbers["data_wait_seconds"] == pytest.approx(0.4)
    assert not caplog.messages, "8 % of a step are not worth a line"


@pytest.mark.parametrize(
    ("device", "cores", "warns"), [("cpu", 0, False), ("cpu", 1, True), ("cuda", 0, True), ("cuda", 3, True)]
)
def test_a_cpu_without_spare_cores_gets_no_advice(device, cores, warns, group, monkeypatch, caplog):
    monkeypatch.setattr(data_wait, "spare_cores", lambda group: cores)
    waiting = DataWait(torch.device(device), 0, group)
    for block in range(1, 2 * BLOCKS):
        waiting.waits._seconds = 5.0
        waiting.numbers(BLOCK_STEPS, 10.0, 4, 5.0 * block)
    assert len(caplog.messages) == warns


def waits_of_steps(waiting, waits, busy=1.0):
    """Record steps that wait for their data, each for its time in `waits`, and then work."""
    for wait in waits:
        waiting.waits._seconds = wait
        waiting.numbers(1, wait + busy, 4, waiting._read_before + wait)


@pytest.fixture
def waiting(group, monkeypatch):
    monkeypatch.setattr(data_wait, "spare_cores", lambda group: 1)
    return DataWait(CPU, 0, group)


def test_few_steps_cause_no_warning(waiting, caplog):
    waits_of_steps(waiting, [0.5] * (BLOCKS * BLOCK_STEPS - 1))
    assert not caplog.messages
    waits_of_steps(waiting, [0.5])
    assert len(caplog.messages) == 1


def test_outages_cause_no_warning(waiting, caplog):
    for _ in range(3):
        waits_of_steps(waiting, [0.01] * 30 + [120.0, 120.0] + [0.01] * 30)
    assert not caplog.messages


def test_waits_of_every_other_step_cause_a_warning(waiting, caplog):
    waits_of_steps(waiting, [0.0, 1.0] * (BLOCKS * BLOCK_STEPS // 2))
    assert caplog.messages[0].startswith("steps wait for data 33% of their time (0.5 of 1.5 s)")


def simulated(reading, busy, workers, steps=400):
    """Seconds of steps and of their waits, with workers that read in turn, two steps ahead each."""
    free = [0.0] * workers  # when each worker can begin its next batch
    taken: list[float] = []
    now = waited = 0.0
    for step in range(steps):
        worker = step % workers
        begin = max(free[worker], taken[step - 2 * workers] if step >= 2 * workers else 0.0)
        free[worker] = ready = begin + reading
        if step >= 4 * workers:
            waited += max(ready - now, 0.0)
        elif step == 4 * workers - 1:
            started = max(now, ready) + busy
        now = max(now, ready)
        taken.append(now)
        now += busy
    return now - started, waited, steps - 4 * workers


@pytest.mark.parametrize("busy", [0.05, 0.3])
@pytest.mark.parametrize("reading", [0.06, 0.31, 0.7, 1.87])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_advised_number_of_workers_ends_the_waits(reading, busy, workers):
    step, waited, steps = simulated(reading, busy, workers)
    if waited <= 0.1 * step:
        return
    line = advice(Load(step, waited, reading * steps, 16 * steps), steps, workers, 1000)
    advised = int(re.search(r"num_workers=(\d+) would do", line)[1])
    step, waited, _ = simulated(reading, busy, advised)
    assert waited <= 0.1 * step
    if advised - 1 > workers:
        step, waited, _ = simulated(reading, busy, advised - 1)
        assert waited > 0.0, "one worker less is not enough"


def test_the_warning_is_one_line_with_its_numbers():
    load = Load(step=50.0, waited=30.0, reading=70.0, samples=1600.0)
    start = (
        "steps wait for data 60% of their time (0.3 of 0.5 s): data.num_workers=4 would do instead of 2, as a worker "
        "reads 22.9 samples/s and a rank could take 80"
    )
    assert advice(load, 100, 2, 4) == start
    assert advice(load, 100, 2, 3) == (
        f"{start}; but a rank has 3 spare cores here: give it more, or shrink images by launcher/prepare.py --max_size"
    )


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    def gathered(*ranks):
        monkeypatch.setattr(data_wait.platform, "node", lambda: "a")
        monkeypatch.setattr(data_wait, "gather_objects", lambda own, group: list(ranks))
        return spare_cores(None)

    everything = set(range(8))
    assert gathered(("a", everything)) == 7
    assert gathered(("a", everything), ("a", everything), ("b", {1})) == 3
    assert gathered(("a", {0, 1, 2}), ("a", {3, 4, 5})) == 2, "a launcher bound each rank to its own cores"
    assert gathered(("a", {0})) == 0
    monkeypatch.undo()
    assert spare_cores(None) == len(os.sched_getaffinity(0)) - 1


def test_a_gpu_waits_from_the_end_of_its_work(monkeypatch):
    """Events carry the device's time at which the work before them ended."""
    clock = SimpleNamespace(device=0.0, host=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(clock.device, clock.host)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = Waits(torch.device("cuda"))
    for loaded, expected in ((1.2, 0.0), (3.0, 1.5), (1.5, 0.0)):
        clock.device, clock.host = 1.5, 0.5  # kernels end a second after the host has queued them
        with waits.measured():
            clock.host = loaded
        assert waits.take() == pytest.approx(expected)
    assert waits.take() == 0.0
