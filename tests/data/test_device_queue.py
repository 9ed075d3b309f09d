"""Queue of batches copied to a device: order, and synchronization on CUDA, by fakes that record every call."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from eve_ds.data.batch import Batch
from eve_ds.data.device_queue import DeviceQueue


def batch_of(number):
    return Batch(keys=[str(number)], pixel_values=torch.full((1, 3, 2, 2), number, dtype=torch.uint8))


def test_cpu_queue_returns_the_same_batches_in_order():
    queue = DeviceQueue(torch.device("cpu"))
    batches = [batch_of(number) for number in range(3)]
    for batch in batches:
        queue.put(batch)
    for batch in batches:
        found = queue.get()
        assert found.keys == batch.keys
        assert found.pixel_values is batch.pixel_values, "pixels must not be copied"
    with pytest.raises(IndexError):
        queue.get()


class Calls(list):
    """Recorded calls in order; `current` is the stream on which kernels would run."""

    current = "main"

    @contextlib.contextmanager
    def stream(self, stream):
        self.current, before = stream.name, self.current
        yield
        self.current = before


@dataclass
class FakeStream:
    calls: Calls
    name: str

    def record_event(self):
        self.calls.append(f"{self.name} records")
        return f"event {self.calls.count(f'{self.name} records')}"

    def wait_event(self, event):
        self.calls.append(f"{self.name} waits for {event}")


@dataclass
class FakeTensor:
    calls: Calls
    name: str

    def record_stream(self, stream):
        self.calls.append(f"{self.name} used on {stream.name}")


@dataclass
class FakeBatch:
    calls: Calls
    name: str

    def tensors(self):
        return [FakeTensor(self.calls, f"{self.name}.pixels"), FakeTensor(self.calls, f"{self.name}.ids")]

    def to(self, device, non_blocking=False):
        self.calls.append(f"{self.name} to {device} on {self.calls.current}, non_blocking {non_blocking}")
        return FakeBatch(self.calls, f"moved {self.name}")


@pytest.fixture
def calls(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(calls, f"side of {device}"))
    monkeypatch.setattr(torch.cuda, "stream", calls.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(calls, f"main of {device}"))
    return calls


def test_cuda_copies_run_on_their_own_stream_and_only_the_consumer_waits(calls):
    queue = DeviceQueue(torch.device("cuda:1"))
    queue.put(FakeBatch(calls, "a"))
    queue.put(FakeBatch(calls, "b"))
    assert calls == [
        "a to cuda:1 on side of cuda:1, non_blocking True",
        "side of cuda:1 records",
        "b to cuda:1 on side of cuda:1, non_blocking True",
        "side of cuda:1 records",
    ]
    assert calls.current == "main"
    for name, event in (("a", 1), ("b", 2)):
        calls.clear()
        assert queue.get().name == f"moved {name}"
        assert calls == [
            f"main of cuda:1 waits for event {event}",
            f"moved {name}.pixels used on main of cuda:1",
            f"moved {name}.ids used on main of cuda:1",
        ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_from_a_gpu_queue_are_complete():
    device = torch.device("cuda", torch.cuda.current_device())
    queue = DeviceQueue(device)
    batches = [Batch(["a"], torch.randint(0, 256, (64, 3, 128, 128), dtype=torch.uint8)) for _ in range(8)]
    for batch in batches:
        queue.put(batch.pin_memory())
    for batch in batches:
        found = queue.get()
        assert found.pixel_values.device == device
        assert torch.equal(found.normalized_pixels.cpu(), batch.normalized_pixels), "pixels must be equal bit for bit"
