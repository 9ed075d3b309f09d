"""Shards in object stores: a real S3 server on the loopback interface, and a stand-in for other stores."""

import logging
import math
import multiprocessing
import os
import pickle
import sys
import threading
import time

import fsspec
import pytest
from fake_clock import FakeClock
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from s3_server import S3Server

from eve_ds.config import DataConfig
from eve_ds.data.index_file import Indices
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage
from eve_ds.data.shard_paths import expand

CONTENT = os.urandom(300_000)
NAMES = ("set/a.tar", "set/b.tar", "set/index.json", "other/c.tar")


@pytest.fixture(scope="module")
def running():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": server.address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        server.files = fsspec.filesystem("s3", skip_instance_cache=True)
        server.files.mkdir("bucket")
        for name in NAMES:
            server.files.pipe(f"bucket/{name}", CONTENT)
        yield server


@pytest.fixture
def server(running):
    running.faults = lambda method, path, index: ""
    running.requests.clear()
    return running


def storage(fake=None, **data):
    remote = {"deadline_seconds": 20, "timeout_seconds": 2}
    return RemoteStorage(DataConfig(remote=remote, **data), (fake or FakeClock()).clock)


def test_ranges_are_those_of_the_object(server):
    opened = storage().open("s3://bucket/set/a.tar")
    assert opened.size == len(CONTENT)
    for offset, size in [(0, 1), (5000, 100_000), (299_999, 1), (299_000, 5000), (300_000, 10)]:
        assert opened.read_at(offset, size) == CONTENT[offset : offset + size]
    assert ("GET", "/bucket/set/a.tar", "bytes=299000-299999") in server.requests


def test_blocks_are_kept_on_the_disk(server, tmp_path):
    assert storage(cache_dir=tmp_path).open("s3://bucket/set/a.tar").read_at(5000, 100) == CONTENT[5000:5100]
    server.requests.clear()
    assert storage(cache_dir=tmp_path).open("s3://bucket/set/a.tar").read_at(5000, 100) == CONTENT[5000:5100]
    assert [request for request in server.requests if request[0] == "GET"] == []


@pytest.mark.parametrize("fault", ["503 SlowDown", "500 InternalError", "503 ServiceUnavailable", "400 RequestTimeout"])
def test_a_fault_that_passes_is_repeated(server, fault):
    fake = FakeClock()
    server.faults = lambda method, path, index: fault if index in (1, 2) else ""
    opened = storage(fake).open("s3://bucket/set/a.tar")
    assert opened.read_at(100_000, 50_000) == CONTENT[100_000:150_000]
    assert len(fake.sleeps) == 2


def test_a_fault_at_the_opening_is_repeated(server):
    fake = FakeClock()
    server.faults = lambda method, path, index: "503 SlowDown" if index == 0 else ""  # HEAD: no text names the error
    assert storage(fake).open("s3://bucket/set/a.tar").size == len(CONTENT)
    assert len(fake.sleeps) == 1


def test_a_store_that_stays_away_ends_the_read_after_the_deadline(server):
    fake = FakeClock()
    opened = storage(fake).open("s3://bucket/set/a.tar")
    server.faults = lambda method, path, index: "503 SlowDown"
    with pytest.raises(RemoteError, match=r"s3://bucket/set/a\.tar cannot be read: SlowDown \(\d+ attempts in \d+ s"):
        opened.read_at(100_000, 50_000)
    assert 5 < fake.time <= 20


LASTING = {
    "403 AccessDenied": r"s3://bucket/set/a\.tar may not be read with these credentials \(AccessDenied\)",
    "403 InvalidAccessKeyId": r"may not be read with these credentials",
    "404 NoSuchKey": r"does not exist \(NoSuchKey\)",
    "400 InvalidRequest": r"cannot be read \(InvalidRequest\)",
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_ends_the_read_at_once(server, fault):
    fake = FakeClock()
    opened = storage(fake).open("s3://bucket/set/a.tar")
    server.faults = lambda method, path, index: fault
    with pytest.raises(RemoteError, match=LASTING[fault]) as caught:
        opened.read_at(100_000, 50_000)
    assert not fake.sleeps
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT[:200_000]], ids=["other", "cut"])
def test_an_object_that_is_replaced_is_refused(server, content):
    remote = storage()
    opened = remote.open("s3://bucket/set/a.tar")
    server.files.pipe("bucket/set/a.tar", content)
    try:
        with pytest.raises(RemoteError, match=r"s3://bucket/set/a\.tar was replaced while it was read"):
            opened.read_at(100_000, 50_000)
        with pytest.raises(RemoteError, match=r"was replaced while it was read \(300,000 bytes, .*; now "):
            remote.open("s3://bucket/set/a.tar")
    finally:
        server.files.pipe("bucket/set/a.tar", CONTENT)


def test_objects_and_buckets_that_are_missing_are_named(server):
    for address in ("s3://bucket/set/no.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(RemoteError, match=rf"{address} does not exist"):
            storage().open(address)
        assert storage().read_small(address, 1000, bytes) is None


SLOW = {
    "open": lambda remote: remote.open("s3://bucket/set/b.tar"),
    "read": lambda remote: remote.open("s3://bucket/set/a.tar").read_at(100_000, 50_000),
    "read_small": lambda remote: remote.read_small("s3://bucket/set/index.json", 1_000_000, bytes),
    "matching": lambda remote: remote.matching("s3://bucket/set/*.tar"),
}


@pytest.mark.parametrize("read", SLOW)
def test_no_slow_answer_holds_a_read_beyond_its_deadline(server, read):
    remote = RemoteStorage(DataConfig(remote={"deadline_seconds": 0.5, "timeout_seconds": 30}))
    remote._server("s3://").open("s3://bucket/other/c.tar", math.inf)  # connecting takes longer
    released = threading.Event()
    server.faults = lambda method, path, index: "" if path.endswith("a.tar") and method == "HEAD" else held(released)
    start = time.monotonic()
    try:
        with pytest.raises(RemoteError, match=r"^s3://bucket/set/\S+ cannot be read: too slow \(1 attempts in [01] s"):
            SLOW[read](remote)
        assert time.monotonic() - start < 3
    finally:
        released.set()


def held(released):
    released.wait(20)
    return ""


def test_ranges_of_an_object_are_requested_at_the_same_time(server):
    opened = RemoteStorage(DataConfig(remote={"reads_ahead": 4})).open("s3://bucket/set/a.tar")
    places = [(number * 60_000, 50_000) for number in range(4)]
    barrier = threading.Barrier(len(places))

    def answer_together(method, path, index):
        if (method, path) == ("GET", "/bucket/set/a.tar"):  # not what an earlier test has given up
            barrier.wait(timeout=20)
        return ""

    server.faults = answer_together
    for place in places:
        opened.want(*place)
    assert [opened.read_at(*place) for place in places] == [CONTENT[start : start + 50_000] for start, _ in places]
    assert not barrier.broken


def test_missing_credentials_are_named(server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteError, match=r"s3://bucket/set/a\.tar needs credentials .*; FSSPEC_S3_ANON=true reads"):
        storage().open("s3://bucket/set/a.tar")


def test_patterns_are_expanded_in_the_order_of_names(server):
    assert storage().matching("s3://bucket/set/*.tar") == ["s3://bucket/set/a.tar", "s3://bucket/set/b.tar"]
    assert storage().matching("s3://bucket/**/[ac].tar") == ["s3://bucket/other/c.tar", "s3://bucket/set/a.tar"]
    assert storage().matching("s3://bucket/none/*.tar") == []


def test_a_storage_that_was_used_works_in_a_forked_process_and_as_a_copy(server):
    remote = RemoteStorage(DataConfig())
    remote.open("s3://bucket/set/a.tar").read_at(100_000, 5000)
    process = multiprocessing.get_context("fork").Process(target=read_b, args=(remote,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    read_b(pickle.loads(pickle.dumps(remote)))


def read_b(remote):
    assert len(remote.open("s3://bucket/set/b.tar").read_at(100_000, 5000)) == 5000


class OtherStore(AbstractFileSystem):
    """Stand-in for a store whose package is not installed here; it knows the option of gcsfs."""

    protocol = ("gs", "gcs")
    objects = {f"bucket/{name}": CONTENT for name in NAMES}  # noqa: RUF012

    def __init__(self, requests_timeout, **options):
        super().__init__(**options)

    def ls(self, path, detail=True, **_):
        inside = [name for name in self.objects if name.rpartition("/")[0] == self._strip_protocol(path)]
        found = [{"name": name, "size": len(CONTENT), "type": "file", "generation": "7"} for name in inside]
        return found if detail else inside

    def info(self, path, **_):
        name = self._strip_protocol(path)
        return next((item for item in self.ls(name.rpartition("/")[0]) if item["name"] == name), None) or fail(name)

    def _open(self, path, mode="rb", **options):
        return OtherFile(self, path, mode, **{key: options[key] for key in ("cache_type", "size") if key in options})


class OtherFile(AbstractBufferedFile):
    """Object of the stand-in."""

    def _fetch_range(self, start, end):
        return CONTENT[start:end]


def fail(name):
    raise FileNotFoundError(name)


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_other_stores_are_read_by_the_same_code(scheme, monkeypatch):
    fsspec.register_implementation(scheme, OtherStore, clobber=True)
    monkeypatch.setitem(sys.modules, "gcsfs", fsspec)
    opened = storage().open(f"{scheme}://bucket/set/a.tar")
    assert opened.read_at(5000, 100_000) == CONTENT[5000:105_000]
    assert [name.rpartition("/")[2] for name in storage().matching(f"{scheme}://bucket/set/*.tar")] == [
        "a.tar",
        "b.tar",
    ]
    with pytest.raises(RemoteError, match=rf"{scheme}://bucket/no\.tar does not exist"):
        storage().open(f"{scheme}://bucket/no.tar")


@pytest.mark.parametrize(
    ("address", "module", "command"),
    [
        ("https://x.invalid/a.tar", "requests", "pip install 'requests>="),
        ("s3://bucket/a.tar", "s3fs", "pip install 's3fs>="),
        ("gs://bucket/a.tar", "gcsfs", "pip install 'gcsfs>="),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(monkeypatch, address, module, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RemoteError, match=rf"^\w+:// needs a package that is not installed: {command}"):
        storage().open(address)


ODD_KEYS = {
    "s3://bucket/odd/a[1].tar": ["s3://bucket/odd/a[1].tar"],
    "s3://bucket/odd/b?.tar": ["s3://bucket/odd/b?.tar"],
    "s3://bucket/odd/c*.tar": ["s3://bucket/odd/c*.tar"],
    "s3://bucket/odd[1]": ["s3://bucket/odd[1]/d.tar"],
    "s3://bucket/od*[[]1]": ["s3://bucket/odd[1]/d.tar"],
    "s3://bucket/odd/a*": ["s3://bucket/odd/a1.tar", "s3://bucket/odd/a[1].tar"],
}
"""What a user names -> the shards; names with the characters of a pattern stand first for what has that very name."""


@pytest.mark.parametrize("spec", ODD_KEYS)
def test_a_name_with_the_characters_of_a_pattern_is_that_object(server, spec):
    for name in ("odd/a[1].tar", "odd/a1.tar", "odd/b?.tar", "odd/bb.tar", "odd/c*.tar", "odd/cc.tar", "odd[1]/d.tar"):
        server.files.pipe(f"bucket/{name}", CONTENT[:100])
    assert expand(spec, Indices(storage())) == ODD_KEYS[spec]


@pytest.mark.parametrize("code", ["403 AccessDenied", "404 NoSuchKey"])
def test_a_named_object_needs_no_index(server, code, caplog):
    server.faults = lambda method, path, index: code if "index.json" in path else ""
    indices = Indices(storage())
    assert indices.beside("s3://bucket/set") == indices.beside("s3://bucket/set") == {}
    assert caplog.text.count("s3://bucket/set/index.json may not be read") == code.startswith("403")
    if code.startswith("403"):
        with pytest.raises(RemoteError, match=r"set/index\.json may not be read with these credentials"):
            Indices(storage()).of("s3://bucket/set")
