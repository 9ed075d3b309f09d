"""Shards at addresses are opened, scanned and searched with many requests at the same time, each of them once."""

import io
import tarfile
import threading

import pytest
from faulty_server import FaultyServer

from eve_ds.config import DataConfig, SourceConfig
from eve_ds.data.order import Place
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import READ_AHEAD, RemoteStorage
from eve_ds.data.shards import find_shards
from eve_ds.data.sources import ShardsSource
from eve_ds.data.tar_headers import HEADER_BYTES
from eve_ds.data.transforms import TrainTransform

COUNT = 8
"""Shards of the set."""


def tar(count, size=6000):
    """Captions that are longer than what is read when a shard is opened."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:06d}.txt")
            info.size = size
            file.addfile(info, io.BytesIO(b"x" * size))
    return buffer.getvalue()


@pytest.fixture
def server():
    with FaultyServer({f"set/{number}.tar": tar(3) for number in range(COUNT)}) as running:
        yield running


@pytest.fixture
def spec(server):
    return f"{server.address}/set/{{0..{COUNT - 1}}}.tar"


def place(shard, number=0):
    return Place(source=0, epoch=0, shard=shard, number=number, slot=0)


def source_of(spec):
    config, remote = SourceConfig(kind="shards", shards=spec, modalities="text"), RemoteStorage(DataConfig())
    return ShardsSource(config, TrainTransform(8, (1.0, 1.0), 0.0, 0), find_shards(spec, remote), remote)


@pytest.fixture
def source(server, spec):
    opened = source_of(spec)
    server.requests.clear()
    yield opened
    opened.close()


def answer_together(server, count, first=0):
    """Let `count` requests for bytes, from that with an index on, wait for each other."""
    barrier = threading.Barrier(count)

    def wait(path, index):
        if path.endswith(".tar") and first <= index < first + count:
            barrier.wait(timeout=20)
        return ""

    server.faults = wait
    return barrier


def test_shards_without_an_index_are_opened_once_at_the_same_time(server, spec):
    barrier = answer_together(server, COUNT, first=1)  # behind the request for the index
    assert [shard.num_samples for shard in find_shards(spec)] == [3] * COUNT
    assert not barrier.broken
    assert len(server.requests) == 1 + 2 * COUNT, "the first headers, then the others"


def test_a_shard_without_an_index_that_is_missing_is_named(server, spec):
    del server.files["set/5.tar"]
    with pytest.raises(RemoteError, match=r"set/5\.tar cannot be read: HTTP 404"):
        find_shards(spec)


def test_shards_are_opened_ahead_at_the_same_time_and_read_once(server, source):
    barrier = answer_together(server, COUNT)
    for shard in range(COUNT):
        source.want(place(shard))
    assert [source.read(place(shard)).key for shard in range(COUNT)] == ["000000"] * COUNT
    assert not barrier.broken
    assert len(server.requests) == 2 * COUNT, "one to open, one to read"


def test_further_samples_of_a_shard_that_is_being_opened_are_read_once(server, source):
    for number in range(3):
        source.want(place(0, number))
    assert [source.read(place(0, number)).key for number in range(3)] == ["000000", "000001", "000002"]
    assert len(server.requests) == 4


def test_a_closed_source_opens_its_shards_again(source):
    for shard in (0, 1):
        source.want(place(shard))
    source.read(place(0))
    source.close()
    assert [source.read(place(shard, 2)).key for shard in (0, 1)] == ["000002"] * 2


def test_the_read_raises_the_error_of_a_shard_that_cannot_be_opened(server, source):
    del server.files["set/3.tar"]
    for shard in range(COUNT):
        source.want(place(shard))
    assert source.read(place(2)).key == "000000"
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"set/3\.tar cannot be read: HTTP 404"):
            source.read(place(3))
    assert source.read(place(4)).key == "000000"


@pytest.mark.parametrize(
    ("count", "size"), [(2000, 600), (40, READ_AHEAD + 1)], ids=["many headers in a read", "one header in a read"]
)
def test_names_of_images_come_by_reads_at_the_same_time(server, count, size):
    server.files["set/0.tar"] = tar(count, size)
    source = source_of(f"{server.address}/set/0.tar")
    server.requests.clear()
    barrier = answer_together(server, 4, first=1)  # behind the opening
    assert list(source.images(0)) == [f"{number:06d}" for number in range(count)]
    assert not barrier.broken
    asked = [request.range.removeprefix("bytes=").split("-") for request in server.requests]
    most = min(len(server.files["set/0.tar"]), count * HEADER_BYTES)
    assert sum(int(last) + 1 - int(first) for first, last in asked) <= most + HEADER_BYTES * len(asked)
    source.close()


def test_the_next_shards_are_opened_while_one_is_searched(server, source):
    barrier = answer_together(server, COUNT)
    assert [list(source.images(shard)) for shard in range(COUNT)] == [["000000", "000001", "000002"]] * COUNT
    assert not barrier.broken
