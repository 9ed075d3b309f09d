"""Shards of an HTTP server with faults: every read gives the bytes of the file, or one line that says what is wrong."""

import os
import re
import ssl
import subprocess
import time

import pytest
from fake_clock import FakeClock
from faulty_server import PAGE, FaultyServer

from eve_ds.config import DataConfig
from eve_ds.data.errors import UnusableData
from eve_ds.data.remote.errors import RemoteError
from eve_ds.data.remote.storage import RemoteStorage

CONTENT = os.urandom(300_000)


@pytest.fixture
def server():
    with FaultyServer({"a.tar": CONTENT, "small.tar": CONTENT[:100], "empty.tar": b""}) as running:
        yield running


@pytest.fixture
def fake():
    return FakeClock()


def storage(fake, **remote):
    return RemoteStorage(DataConfig(remote={"deadline_seconds": 60, "timeout_seconds": 10, **remote}), fake.clock)


RANGES = [(0, 1), (0, 512), (4095, 2), (5000, 100_000), (299_999, 1), (299_000, 5000), (300_000, 10), (400_000, 1)]


def test_ranges_are_those_of_the_file(server, fake):
    opened = storage(fake).open(f"{server.address}/a.tar")
    assert opened.size == len(CONTENT)
    for offset, size in RANGES:
        assert opened.read_at(offset, size) == CONTENT[offset : offset + size]
    assert not fake.sleeps


def test_a_small_or_empty_object_is_read_without_ranges_too(server, fake):
    server.faults = lambda path, index: "no ranges" if "small" in path else ""
    remote = storage(fake)
    small, empty = remote.open(f"{server.address}/small.tar"), remote.open(f"{server.address}/empty.tar")
    assert (small.size, small.read_at(10, 1000), empty.size, empty.read_at(0, 10)) == (100, CONTENT[10:100], 0, b"")


def test_headers_are_read_ahead_and_samples_are_not(server, fake):
    opened = storage(fake).open(f"{server.address}/a.tar")
    for place in range(5000, 200_000, 4096):
        assert opened.read_at(place, 512) == CONTENT[place : place + 512]
    assert len(server.requests) == 2
    opened.read_at(10, 50_000)
    assert server.requests[-1].range == "bytes=10-50009"


PASSING = [
    *(f"status {code}" for code in (408, 425, 429, 500, 502, 503, 504)),
    *("cut", "too long", "more bytes", "hang", "short range", "other range", "no Content-Range"),
]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_repeated(server, fake, fault):
    # At the probe and twice at the range; another range is no fault of the probe, and a hang takes its time.
    faulty = {"other range": (1, 2, 3), "hang": (1,)}.get(fault, (0, 2, 3))
    server.faults = lambda path, index: fault if index in faulty else ""
    opened = storage(fake, timeout_seconds=1).open(f"{server.address}/a.tar")
    assert opened.read_at(100_000, 50_000) == CONTENT[100_000:150_000]
    assert len(fake.sleeps) == len(faulty)


LASTING = {
    **{f"status {code}": rf"cannot be read: HTTP {code} \w+" for code in (400, 401, 403, 404, 405, 410, 451, 501, 505)},
    "status 416": r"is shorter than when it was opened \(HTTP 416\)",
    "no ranges": r"the server of http\S+a\.tar does not read ranges .*: use a server with range requests, or download",
    "gzip": r"in another coding \(Content-Encoding: gzip\), so that offsets .*: turn its compression off for tars",
    "redirect ftp://127.0.0.1/a.tar": r"is, or leads to, an address that is not http\(s\)",
    "redirect file:///etc/passwd": r"is, or leads to, an address that is not http\(s\)",
    "redirect /a.tar": r"leads in a circle of redirects",
    **{
        f"redirect {address}": r"is, or leads to, an address that is not valid: check its host and port"
        for address in (
            "http://[bad/a.tar",
            "http://[::1/a.tar",
            "http://a..b/a.tar",
            f"http://{'a' * 64}.org/",
            "http://127.0.0.1:99999/",
            "http://127.0.0.1:port/",
        )
    },
}


@pytest.mark.parametrize("when", ["opening", "reading"])
@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_ends_the_read_at_once(server, fake, fault, when):
    server.faults = lambda path, index: fault if index >= (when == "reading") else ""
    with pytest.raises(RemoteError, match=LASTING[fault]) as caught:
        storage(fake).open(f"{server.address}/a.tar").read_at(100_000, 50_000)
    assert not fake.sleeps
    assert "\n" not in str(caught.value)
    assert f"{server.address}/a.tar" in str(caught.value)
    assert isinstance(caught.value, UnusableData)


@pytest.mark.parametrize(
    ("fault", "reason"), [("status 503", "HTTP 503"), ("cut", r"connection lost"), ("hang", "timed out")]
)
def test_a_server_that_stays_away_ends_the_read_after_the_deadline(server, fake, fault, reason):
    opened = storage(fake, timeout_seconds=0.2 if fault == "hang" else 10, deadline_seconds=20).open(
        f"{server.address}/a.tar"
    )
    server.faults = lambda path, index: fault
    rule = rf"a\.tar cannot be read: {reason} \(\d+ attempts in \d+ s, data\.remote\.deadline_seconds is 20\); rerun"
    with pytest.raises(RemoteError, match=rule):
        opened.read_at(100_000, 50_000)
    assert 5 < fake.time <= 20


def test_a_closed_port_and_an_unknown_host_are_named(fake, free_port):
    for host, reason in ((f"127.0.0.1:{free_port}", "no connection"), ("no.such.host.invalid", "unknown host")):
        with pytest.raises(RemoteError, match=rf"http://{re.escape(host)}/a\.tar cannot be read: {reason}"):
            storage(fake).open(f"http://{host}/a.tar")


def test_https_to_a_server_without_encryption_is_named(server, fake):
    address = f"https://{server.host}/a.tar"
    with pytest.raises(RemoteError, match=rf"^the server of {address} does not answer in TLS: .* http://\?$"):
        storage(fake).open(address)
    assert not fake.sleeps


def test_a_certificate_of_an_unknown_authority_is_named(fake, tmp_path):
    file = tmp_path / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    command += ["-keyout", str(file), "-out", f"{file}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{file}.crt", file)
    with FaultyServer({}) as other:
        other._server.socket = context.wrap_socket(other._server.socket, server_side=True)
        address = f"https://{other.host}/a.tar"
        with pytest.raises(RemoteError, match=rf"^the certificate of {address} cannot be verified: name the file"):
            storage(fake).open(address)


def in_seconds(seconds):
    return time.gmtime(time.time() + seconds)


WAITS = {
    "a number": ("17", 17),
    "a date": ("%a, %d %b %Y %H:%M:%S GMT", 40),
    "a date of RFC 850": ("%A, %d-%b-%y %H:%M:%S GMT", 40),
    "a date of asctime": ("%a %b %d %H:%M:%S %Y", 40),
    "a date that is over": ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
    "a negative number": ("-5", 0),
    "neither": ("soon", 0),
    "an impossible date": ("Mon, 99 Foo 2020 99:99:99 GMT", 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_that_the_server_asks_for_is_kept(server, fake, name):
    form, seconds = WAITS[name]
    text = time.strftime(form, in_seconds(seconds))
    server.faults = lambda path, index: f"status 429 {text}" if index == 0 else ""
    storage(fake).open(f"{server.address}/a.tar")
    (slept,) = fake.sleeps
    # Dates have whole seconds, and a busy machine takes some.
    assert slept <= 0.1 if seconds == 0 else seconds - 20 < slept <= seconds


@pytest.mark.parametrize("form", ["3600", WAITS["a date"][0], "9" * 18])
def test_a_wait_beyond_the_deadline_is_told(server, fake, form):
    text = time.strftime(form, in_seconds(10_000))
    server.faults = lambda path, index: f"status 503 {text}"
    rule = r"a\.tar cannot be read: HTTP 503 and asks to wait [\d,]{5,} s \(1 attempts in 0 s, data\.remote\.deadline"
    with pytest.raises(RemoteError, match=rule):
        storage(fake).open(f"{server.address}/a.tar")
    assert not fake.sleeps


VARIABLES = {
    ("REQUESTS_CA_BUNDLE", "/no/such/file"): r"the variable REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file",
    ("CURL_CA_BUNDLE", "/no/such/file"): r"the variable REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file",
    ("REQUESTS_CA_BUNDLE", __file__): r"the file that the variable REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names holds no",
    ("HTTPS_PROXY", "http://"): r"the variable HTTP_PROXY or HTTPS_PROXY holds no address",
}


@pytest.mark.parametrize(("name", "value"), VARIABLES)
def test_a_wrong_variable_is_named_at_once(server, fake, monkeypatch, name, value):
    port = server.host.rpartition(":")[2]
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        RemoteError, match=rf"^https://localhost:{port}/a\.tar cannot be read: {VARIABLES[name, value]}"
    ):
        storage(fake).open(f"https://localhost:{port}/a.tar?sig=secret")
    assert not fake.sleeps


READS = {
    "open": lambda remote, server: remote.open(f"{server.address}/b.tar"),
    "read": lambda remote, server: remote.open(f"{server.address}/a.tar").read_at(100_000, 50_000),
    "read_small": lambda remote, server: remote.read_small(f"{server.address}/b.tar", 1_000_000, bytes),
}


@pytest.mark.parametrize("fault", ["drip", "drip headers", "hang"])
@pytest.mark.parametrize("read", READS)
def test_no_slow_answer_holds_a_read_beyond_its_deadline(server, read, fault):
    remote = RemoteStorage(DataConfig(remote={"deadline_seconds": 0.3, "timeout_seconds": 30}))
    server.files["b.tar"] = CONTENT
    server.faults = lambda path, index: fault if index >= (read == "read") else ""
    start = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"[ab]\.tar cannot be read: too slow \(.*data\.remote\.deadline_seconds is 0\.3"
    ):
        READS[read](remote, server)
    assert time.monotonic() - start < 2


REPLACED = {
    "other bytes": (CONTENT[::-1], True),
    "cut": (CONTENT[:200_000], True),
    "longer": (CONTENT * 2, True),
    "cut, without ETags": (CONTENT[:200_000], False),
    "longer, without ETags": (CONTENT * 2, False),
}


@pytest.mark.parametrize("name", REPLACED)
def test_an_object_that_is_replaced_is_refused(server, fake, name):
    content, etags = REPLACED[name]
    server.etags = etags
    remote = storage(fake)
    opened = remote.open(f"{server.address}/a.tar")
    server.files["a.tar"] = content
    rule = r"a\.tar was replaced while it was read \(300,000 bytes, .*; now .*\): restore it and rerun"
    with pytest.raises(RemoteError, match=rule):
        opened.read_at(100_000, 50_000)
    with pytest.raises(RemoteError, match="was replaced"):
        remote.open(f"{server.address}/a.tar")


@pytest.mark.parametrize("other", ["no ETag", "Last-Modified 1"])
@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_an_answer_without_the_tag_of_others_is_of_the_same_object(server, fake, other, faulty):
    server.faults = lambda path, index: other if index == faulty else ""
    opened = storage(fake).open(f"{server.address}/a.tar")
    for place in (50_000, 100_000, 150_000):
        assert opened.read_at(place, 5000) == CONTENT[place : place + 5000]
    server.files["a.tar"] = CONTENT[::-1]
    with pytest.raises(RemoteError, match=r"a\.tar was replaced while it was read"):
        opened.read_at(200_000, 5000)


def test_objects_are_compared_by_the_time_of_the_last_change_if_there_is_no_tag(server, fake):
    server.faults = lambda path, index: f"Last-Modified {min(index, 1)}"
    opened = storage(fake).open(f"{server.address}/a.tar")
    with pytest.raises(
        RemoteError, match=r"replaced .* \(300,000 bytes, Mon.* 00:00:00 GMT; now 300,000 bytes, Mon.*:01 "
    ):
        opened.read_at(100_000, 5000)


@pytest.mark.parametrize("fault", ["page", "long page"])
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_a_web_page_in_place_of_an_object_is_named(server, fake, fault, when):
    server.faults = lambda path, index: fault if index >= (when == "reading") else ""
    rule = rf"^{server.address}/a\.tar is a web page: check the address, and whether the server wants a login"
    if (fault, when) == ("page", "opening"):
        assert storage(fake).open(f"{server.address}/a.tar").read_at(0, 10) == PAGE[:10], "the caller knows the size"
        return
    with pytest.raises(RemoteError, match=rule):
        storage(fake).open(f"{server.address}/a.tar").read_at(100_000, 50_000)


def test_a_weak_etag_is_the_same_version_as_a_strong_one(server, fake):
    server.faults = lambda path, index: "weak" if index % 2 else ""
    opened = storage(fake).open(f"{server.address}/a.tar")
    assert opened.read_at(100_000, 50_000) + opened.read_at(200_000, 50_000) == (
        CONTENT[100_000:150_000] + CONTENT[200_000:250_000]
    )


def test_an_answer_in_chunks_is_read(server, fake):
    server.faults = lambda path, index: "chunked"
    assert storage(fake).open(f"{server.address}/a.tar").read_at(5000, 50_000) == CONTENT[5000:55_000]
    assert not fake.sleeps


def test_a_server_must_say_the_size_once(server, fake):
    server.faults = lambda path, index: "no total" if index else ""
    assert storage(fake).open(f"{server.address}/a.tar").read_at(5000, 50_000) == CONTENT[5000:55_000]
    server.faults = lambda path, index: "no total"
    with pytest.raises(
        RemoteError, match=r"a\.tar does not say its size .*: use another server, or download the shards"
    ):
        storage(fake).open(f"{server.address}/a.tar")
    assert not fake.sleeps


def test_redirects_are_followed_without_the_password(server, fake):
    with FaultyServer({"b.tar": CONTENT}) as other:
        server.faults = lambda path, index: f"redirect {other.address}/b.tar"
        opened = storage(fake).open(f"http://user:secret@{server.host}/a.tar")
        assert opened.read_at(5000, 50_000) == CONTENT[5000:55_000]
        assert all("Authorization" in request.headers for request in server.requests)
        assert not any("Authorization" in request.headers for request in other.requests)


@pytest.mark.parametrize("fault", ["status 403", "status 503", "no ranges", "gzip", "status 416", "cut"])
def test_no_line_and_no_log_shows_credentials(server, fake, fault, caplog):
    server.faults = lambda path, index: fault if index else ""
    address = f"http://user:secret@{server.host}/a.tar?X-Amz-Signature=secret"
    with caplog.at_level("DEBUG"), pytest.raises(RemoteError) as caught:
        storage(fake).open(address).read_at(100_000, 50_000)
    assert server.requests[-1].path == "/a.tar?X-Amz-Signature=secret"
    assert "secret" not in str(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("eve_ds")]
    assert "secret" not in "".join(ours)


@pytest.mark.parametrize("fault", ["", "status 503", "cut", "too long", "gzip whole", "chunked"])
def test_an_index_is_read_as_a_whole(server, fake, fault):
    server.files["index.json"] = b"[1, 2]"
    server.faults = lambda path, index: fault if index == 0 else ""
    remote = storage(fake)
    assert remote.read_small(f"{server.address}/index.json", 100, bytes) == b"[1, 2]"
    assert remote.read_small(f"{server.address}/no.json", 100, bytes) is None
    with pytest.raises(RemoteError, match=r"index\.json has more than the 5 bytes that are read"):
        remote.read_small(f"{server.address}/index.json", 5, bytes)
