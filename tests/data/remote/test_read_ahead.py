"""Reading ahead: requests at the same time, the same bytes and errors as without, and sources that learn of a place."""

import os
import threading
from itertools import islice

import pytest
from fake_clock import FakeClock
from faulty_server import FaultyServer

from eve_ds.config import DataConfig
from eve_ds.data.order import Place
from eve_ds.data.pipeline import announced
from eve_ds.data.remote.block_cache import block_bytes
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage

CONTENT = os.urandom(9 * 2**16)
AHEAD = 4
PLACES = [(2**16 * number + 100, 50_000) for number in range(1, AHEAD + 1)]


@pytest.fixture
def server():
    with FaultyServer({"a.tar": CONTENT}) as running:
        yield running


@pytest.fixture(params=[False, True], ids=["without a cache", "with a cache"])
def opened(request, server, tmp_path):
    cache = {"cache_dir": tmp_path, "cache_bytes": 2**24} if request.param else {}
    config = DataConfig(remote={"reads_ahead": AHEAD, "timeout_seconds": 10}, **cache)
    return RemoteStorage(config, FakeClock().clock).open(f"{server.address}/a.tar")


def test_wanted_bytes_are_requested_at_the_same_time(server, opened):
    barrier = threading.Barrier(AHEAD)

    def answer_together(path, index):
        barrier.wait(timeout=20)
        return ""

    server.faults = answer_together
    for place in PLACES:
        opened.want(*place)
    for offset, size in PLACES:
        assert opened.read_at(offset, size) == CONTENT[offset : offset + size]
    assert not barrier.broken


def test_wanted_bytes_are_requested_once(server, opened):
    for _ in range(2):
        opened.want(*PLACES[0])
    assert opened.read_at(*PLACES[0]) == CONTENT[PLACES[0][0] : sum(PLACES[0])]
    assert len(server.requests) == 2, "one of the opening, one of the bytes"


def test_wanted_bytes_beyond_the_end_are_cut(opened):
    opened.want(len(CONTENT) - 10, 100)
    assert opened.read_at(len(CONTENT) - 10, 100) == CONTENT[-10:]


def test_the_read_raises_the_error_of_a_wanted_one(server, opened):
    del server.files["a.tar"]
    opened.want(*PLACES[0])
    with pytest.raises(RemoteError, match=r"a\.tar cannot be read: HTTP 404"):
        opened.read_at(*PLACES[0])


def test_a_closed_shard_reads_again_what_was_wanted(server, opened):
    opened.want(*PLACES[0])
    opened.close()
    assert opened.read_at(*PLACES[0]) == CONTENT[PLACES[0][0] : sum(PLACES[0])]


class Listener:
    def __init__(self):
        self.heard = []

    def want(self, place):
        self.heard.append(place.slot)


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_places_are_announced_ahead_and_stay_in_order(ahead):
    places = [(number + 1, Place(number % 2, 0, 0, number, number)) for number in range(12)]
    sources = [Listener(), Listener()]
    found = announced(iter(places), sources, ahead)
    assert list(islice(found, 4)) == places[:4]
    heard = sorted(sources[0].heard + sources[1].heard)
    assert heard == list(range(4 + ahead if ahead else 0))
    assert list(found) == places[4:]


@pytest.mark.parametrize(
    ("most", "expected"), [(2**24, 2**16), (2**27, 2**17), (2**28 - 1, 2**17), (2**32, 2**22), (2**40, 2**22)]
)
def test_a_smaller_cache_has_smaller_blocks(most, expected):
    assert block_bytes(most) == expected
