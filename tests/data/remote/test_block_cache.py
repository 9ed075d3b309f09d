"""Cache of blocks: bounded, whole, shared by processes, and never needed."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from fake_clock import FakeClock
from faulty_server import FaultyServer

from eve_ds.config import DataConfig
from eve_ds.data.remote import block_cache, storage
from eve_ds.data.remote.block_cache import OWN_FOLDER, PAUSE_SECONDS, BlockCache
from eve_ds.data.remote.cache_locks import LOCK_SECONDS, STUCK_SECONDS, CacheLocks
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.retries import Clock
from eve_ds.data.remote.storage import RemoteStorage

BLOCK = 1000
CONTENT = os.urandom(50_500)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(storage, "block_bytes", lambda most: BLOCK)


@pytest.fixture
def server():
    with FaultyServer({"a.tar": CONTENT}) as running:
        yield running


def opened(server, folder, fake=None, name="a.tar", content="", **data):
    clock = (fake or FakeClock()).clock
    return RemoteStorage(DataConfig(cache_dir=folder, **data), clock).open(f"{server.address}/{name}", content)


def ranges(server):
    """Ranges that were asked for, without those of an opening."""
    return [request.range for request in server.requests if request.range != "bytes=0-4095"]


def blocks_of(folder, number="*"):
    """Files of the blocks with a number; locks have numbers as well."""
    files = (Path(folder) / OWN_FOLDER).glob(f"*/{number}")
    return [file for file in files if file.parent.name != "locks"]


def stored(folder):
    return sum(file.stat().st_size for file in blocks_of(folder))


PLACES = [(0, 1), (4500, 100), (4999, 2), (10_000, 3000), (50_400, 500), (60_000, 5)]


@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_bytes_are_those_of_the_object_at_the_first_and_the_second_read(server, tmp_path, offset, size):
    first = opened(server, tmp_path).read_at(offset, size)
    before = len(ranges(server))
    assert first == opened(server, tmp_path).read_at(offset, size) == CONTENT[offset : offset + size]
    assert len(ranges(server)) == before


def test_a_block_is_fetched_once_and_the_last_one_is_shorter(server, tmp_path):
    file = opened(server, tmp_path)
    for offset in range(50_000, 50_500, 100):
        file.read_at(offset, 100)
    assert ranges(server) == ["bytes=50000-50499"]


def test_an_object_with_another_version_has_blocks_of_its_own(server, tmp_path):
    assert opened(server, tmp_path).read_at(10_000, 500) == CONTENT[10_000:10_500]
    server.files["a.tar"] = CONTENT[::-1]
    assert opened(server, tmp_path).read_at(10_000, 500) == CONTENT[::-1][10_000:10_500]


MARKS = {"ETag": "", "Last-Modified": "Last-Modified 1", "neither": "no ETag"}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("content", ["", "hash"])
def test_objects_that_differ_in_their_query_have_blocks_of_their_own(server, tmp_path, mark, content):
    server.faults = lambda path, index: MARKS[mark]
    server.files = {"get?id=1": CONTENT, "get?id=2": CONTENT[::-1]}
    for _ in range(2):
        for name, data in server.files.items():
            assert opened(server, tmp_path, name=name, content=content).read_at(10_000, 500) == data[10_000:10_500]


def test_an_object_that_is_signed_anew_is_read_from_its_blocks(server, tmp_path):
    opened(server, tmp_path, name="a.tar?X-Amz-Date=1&X-Amz-Signature=a").read_at(10_000, 500)
    opened(server, tmp_path, name="./a.tar?X-Amz-Date=2&X-Amz-Signature=b").read_at(10_000, 500)
    assert ranges(server) == ["bytes=10000-10999"]


@pytest.mark.parametrize("mark", MARKS)
def test_an_object_with_another_hash_in_its_index_has_blocks_of_its_own(server, tmp_path, mark):
    server.faults = lambda path, index: MARKS[mark]
    for content, data in {"old": CONTENT, "new": CONTENT[::-1]}.items():
        server.files["a.tar"] = data
        for _ in range(2):
            assert opened(server, tmp_path, content=content).read_at(10_000, 500) == data[10_000:10_500]
    assert ranges(server) == ["bytes=10000-10999"] * 2


def test_an_object_without_a_hash_and_a_version_is_not_stored(server, tmp_path, caplog):
    server.faults = lambda path, index: MARKS["neither"]
    remote = RemoteStorage(DataConfig(cache_dir=tmp_path), FakeClock().clock)
    for data in (CONTENT, CONTENT[::-1]):
        server.files["a.tar"] = data
        assert remote.open(f"{server.address}/a.tar?sig=secret").read_at(10_000, 500) == data[10_000:10_500]
    assert stored(tmp_path) == 0
    rule = (
        "/a.tar has no hash in an index.json and its server sends neither ETag nor Last-Modified: data.cache_dir does"
    )
    assert caplog.text.count(rule) == 1
    assert "secret" not in caplog.text


def test_a_block_with_wrong_bytes_is_removed_when_they_are_read_again(server, tmp_path):
    server.faults = lambda path, index: "zeros" if index == 1 else ""
    file = opened(server, tmp_path)
    assert file.read_at(10_100, 50) == bytes(50)
    assert opened(server, tmp_path).read_at(10_100, 50) == bytes(50)
    assert file.reread(9900, 200) == CONTENT[9900:10_100]
    assert not blocks_of(tmp_path, 10)
    assert file.read_at(10_100, 50) == CONTENT[10_100:10_150]
    assert file.reread(10_100, 50) == CONTENT[10_100:10_150]
    assert blocks_of(tmp_path, 10), "right bytes stay"


DAMAGE = {
    "cut": lambda data: data[:-10],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_block_is_fetched_again(server, tmp_path, name):
    opened(server, tmp_path).read_at(10_000, 500)
    (block,) = blocks_of(tmp_path, 10)
    whole = block.read_bytes()
    block.write_bytes(DAMAGE[name](whole))
    assert opened(server, tmp_path).read_at(10_000, 500) == CONTENT[10_000:10_500]
    assert len(ranges(server)) == 2
    assert block.read_bytes() == whole


def cache(folder, most=20 * (BLOCK + 4), fake=None):
    return BlockCache(folder, most, (fake or FakeClock()).clock)


def put(blocks, number, data=bytes(BLOCK)):
    return blocks.read(f"object/{number}", 0, len(data), len(data), lambda: data)


def missing():
    raise AssertionError("the block must be stored")


def test_the_limit_holds_and_the_blocks_used_last_stay(tmp_path):
    blocks = cache(tmp_path)
    now = time.time()
    for number in range(20):
        put(blocks, number)
        os.utime(tmp_path / OWN_FOLDER / "object" / str(number), (now - 1000 + number,) * 2)
    blocks.read("object/3", 0, 1, BLOCK, missing)  # used: it becomes the newest
    for number in range(20, 30):
        put(blocks, number)
        assert stored(tmp_path) <= 20 * (BLOCK + 4)
    left = sorted(int(file.name) for file in (tmp_path / OWN_FOLDER / "object").iterdir())
    assert 3 in left
    assert {0, 1, 2, 4}.isdisjoint(left)
    assert set(range(20, 30)) <= set(left)


def test_a_block_above_the_limit_is_read_and_not_stored(tmp_path):
    blocks = cache(tmp_path, most=500)
    assert put(blocks, 0) == bytes(BLOCK)
    assert stored(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "many", "-5", "9" * 40, "0"])
def test_a_damaged_count_of_bytes_does_not_break_the_limit(tmp_path, text):
    blocks = cache(tmp_path)
    for number in range(20):
        put(blocks, number)
    (tmp_path / OWN_FOLDER / "used").write_text(text)
    for number in range(20, 45):
        put(blocks, number)
    assert stored(tmp_path) <= (20 if text != "0" else 40) * (BLOCK + 4)


def test_parts_of_blocks_of_killed_processes_are_removed(tmp_path):
    blocks = cache(tmp_path)
    put(blocks, 0)
    part = tmp_path / OWN_FOLDER / "object" / ".7.12345.0"
    part.write_bytes(bytes(5 * BLOCK))
    os.utime(part, (1, 1))
    for number in range(1, 25):
        put(blocks, number)
    assert not part.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_bytes_is_logged_and_read_around(server, tmp_path, number, monkeypatch, caplog):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    fake = FakeClock()
    file = opened(server, tmp_path, fake)
    file.read_at(5000, 500)
    replace = os.replace
    monkeypatch.setattr(block_cache.os, "replace", fail)
    assert file.read_at(10_100, 50) == CONTENT[10_100:10_150]
    assert file.read_at(20_100, 5000) == CONTENT[20_100:25_100]
    assert file.read_at(5000, 500) == CONTENT[5000:5500], "stored blocks are still read"
    assert ranges(server) == ["bytes=5000-5999", "bytes=10000-10999", "bytes=20100-25099"]
    assert f"data.cache_dir ({tmp_path}) takes no block: {os.strerror(number)}; reading without it" in caplog.text
    assert not list(tmp_path.glob("*/*/.*")), "no part of a block is left"
    monkeypatch.setattr(block_cache.os, "replace", replace)
    fake.time += PAUSE_SECONDS
    file.read_at(20_100, 50)
    assert blocks_of(tmp_path, 20)


def test_other_files_of_the_folder_are_neither_counted_nor_deleted(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(bytes(100 * BLOCK))
    os.utime(tmp_path / "photos" / "a.jpg", (1, 1))
    blocks = cache(tmp_path)
    for number in range(50):
        put(blocks, number)
    assert (tmp_path / "photos" / "a.jpg").stat().st_size == 100 * BLOCK
    assert stored(tmp_path) > 10 * BLOCK


def test_a_disk_that_is_full_from_the_start_is_read_around(server, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fake = FakeClock()
    with monkeypatch.context() as full:
        full.setattr(Path, "mkdir", fail)
        file = opened(server, tmp_path / "cache", fake)
        assert file.read_at(10_100, 5000) == CONTENT[10_100:15_100]
    assert "takes no block: No space left on device; reading without it for 60 seconds" in caplog.text
    fake.time += PAUSE_SECONDS
    file.read_at(20_100, 50)
    assert stored(tmp_path / "cache") == BLOCK + 4


def test_a_folder_that_cannot_be_made_is_refused(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        RemoteError, match=r"data\.cache_dir \(.*file/x\) cannot be used: Not a directory; name a folder"
    ):
        opened(server, tmp_path / "file" / "x")


def test_the_blocks_that_are_known_to_be_right_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "MOST_CHECKED", 5)
    blocks = cache(tmp_path)
    for number in [*range(12), *range(12)]:
        put(blocks, number)
        assert len(blocks._checked) <= 5


def test_a_folder_that_is_removed_during_the_run_is_read_around(server, tmp_path):
    file = opened(server, tmp_path / "cache")
    file.read_at(5000, 10)
    os.rename(tmp_path / "cache", tmp_path / "gone")
    assert file.read_at(5000, 10) == CONTENT[5000:5010]
    assert file.read_at(30_000, 10) == CONTENT[30_000:30_010]


def read_everything(address, folder, seed):
    order = sorted(range(0, len(CONTENT), 250), key=lambda place: hash((place, seed)) % 1000)
    file = RemoteStorage(DataConfig(cache_dir=folder)).open(address)
    assert all(file.read_at(place, 250) == CONTENT[place : place + 250] for place in order)


def test_processes_fetch_each_block_once_together(server, tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = [(f"{server.address}/a.tar", tmp_path, seed) for seed in range(4)]
    readers = [context.Process(target=read_everything, args=one) for one in arguments]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4
    # The probe of each process holds the first blocks.
    assert len(ranges(server)) == len(set(ranges(server))) == len(range(4, 51))
    assert stored(tmp_path) == len(CONTENT) - 4000 + 47 * 4


def test_the_folder_is_filled_while_others_evict(server, tmp_path):
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_with_little_room, args=(server.address, tmp_path, n)) for n in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 3
    assert stored(tmp_path) <= 12 * (BLOCK + 4)


def read_with_little_room(server, folder, seed):
    config = DataConfig(cache_dir=folder).model_copy(update={"cache_bytes": 12 * (BLOCK + 4)})
    file = RemoteStorage(config).open(f"{server}/a.tar")
    for place in sorted(range(4000, len(CONTENT), 1500), key=lambda place: hash((place, seed)) % 1000):
        assert file.read_at(place, 500) == CONTENT[place : place + 500]


@pytest.fixture
def frozen(tmp_path):
    """Function that lets another open file hold a lock of the cache, as a process that is stopped does."""
    files = []

    def hold(name):
        path = tmp_path / OWN_FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append(path.open("a"))
        fcntl.flock(files[-1], fcntl.LOCK_EX)

    yield hold
    for file in files:
        file.close()


def test_a_stopped_process_delays_a_block_by_seconds_and_further_ones_by_nothing(frozen, tmp_path):
    fake = FakeClock()
    blocks = cache(tmp_path, fake=fake)
    for number in range(block_cache.LOCKS):
        frozen(f"locks/{number}")
    assert put(blocks, 1) == bytes(BLOCK)
    assert LOCK_SECONDS <= fake.time < LOCK_SECONDS + 0.1
    before = fake.time
    blocks.read("object/1", 0, 1, BLOCK, missing)  # stored without the lock
    for _ in range(5):
        blocks_of(tmp_path, 1)[0].unlink()
        put(blocks, 1)
    assert fake.time == before, "the lock is known to be stuck"
    fake.time += STUCK_SECONDS
    blocks_of(tmp_path, 1)[0].unlink()
    put(blocks, 1)
    assert fake.time - before > STUCK_SECONDS + LOCK_SECONDS - 0.1, "it is tried again"


def test_a_process_that_is_stopped_while_it_counts_costs_a_block_its_place(frozen, tmp_path):
    fake = FakeClock()
    blocks = cache(tmp_path, fake=fake)
    frozen("used")
    for number in range(3):
        assert put(blocks, number) == bytes(BLOCK)
    assert fake.time < LOCK_SECONDS + 0.1
    assert not blocks_of(tmp_path)


def test_a_lock_that_is_given_back_is_taken(tmp_path):
    locks = CacheLocks(Clock(time.monotonic, lambda _: fcntl.flock(held, fcntl.LOCK_UN)))
    with (tmp_path / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with locks.taken(tmp_path / "lock") as descriptor:
            assert descriptor is not None


def test_a_file_system_without_locks_counts_as_locked(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert put(cache(tmp_path), 1) == bytes(BLOCK)
    cache(tmp_path).read("object/1", 0, 1, BLOCK, missing)
