"""Backoff, deadline, and the share of failed requests, on a clock without waits."""

import random
import re
import threading

import pytest
from fake_clock import FakeClock

from eve_ds.config import RemoteConfig
from eve_ds.data.remote.errors import FailedAttempt, RemoteError
from eve_ds.data.remote.retries import LONGEST_WAIT, MANY_ATTEMPTS, PAUSE_SECONDS, SYSTEM_CLOCK, WINDOW, Retries

ADDRESS = "https://user:secret@host/a.tar?sig=secret"


def retries(fake, **config):
    return Retries(RemoteConfig(**config), fake.clock)


def failing(times, reason="HTTP 503"):
    left = iter(range(times))

    def request(end):
        if next(left, None) is not None:
            raise FailedAttempt(reason)
        return "done"

    return request


def test_waits_double_up_to_a_limit_and_are_partly_random():
    fake = FakeClock()
    assert retries(fake, deadline_seconds=1000).call(ADDRESS, failing(12)) == "done"
    whole = [min(0.1 * 2**number, LONGEST_WAIT) for number in range(12)]
    assert all(wait / 2 <= slept <= wait for wait, slept in zip(whole, fake.sleeps, strict=True))
    other = FakeClock()
    retries(other, deadline_seconds=1000).call(ADDRESS, failing(12))
    assert other.sleeps != fake.sleeps


def test_a_long_outage_is_told_once_a_minute(caplog):
    fake = FakeClock()
    calls = retries(fake, deadline_seconds=300)
    calls.call(ADDRESS, failing(MANY_ATTEMPTS - 1))
    assert not caplog.messages
    with pytest.raises(RemoteError):
        calls.call(ADDRESS, failing(1000))
    with pytest.raises(RemoteError):
        calls.call(ADDRESS, failing(1000))
    assert PAUSE_SECONDS * len(caplog.messages) <= fake.time + PAUSE_SECONDS
    assert len(caplog.messages) > 5
    first = r"https://host/a\.tar cannot be read: HTTP 503 \(6 attempts\); trying for 29\d s more \(data\.remote\.deadl"
    assert re.match(first, caplog.messages[0])


def test_the_random_numbers_of_the_run_are_left_alone():
    random.seed(1)
    expected = random.Random(1).random()
    retries(FakeClock()).call(ADDRESS, failing(3))
    assert random.random() == expected


def test_the_end_of_a_read_is_told_to_each_request():
    fake = FakeClock()
    ends = []

    def request(end):
        ends.append(end)
        if len(ends) < 3:
            raise FailedAttempt("cut")

    fake.time = 100.0
    retries(fake, deadline_seconds=50).call(ADDRESS, request)
    assert ends == [150.0] * 3


def test_the_deadline_ends_a_read_before_a_wait_that_passes_it():
    fake = FakeClock()
    with pytest.raises(RemoteError, match=r"^https://host/a\.tar cannot be read: HTTP 503 \(\d+ attempts") as caught:
        retries(fake, deadline_seconds=40).call(ADDRESS, failing(1000))
    assert fake.time <= 40
    assert "secret" not in str(caught.value)


def test_a_share_of_failed_reads_ends_the_run_by_name():
    fake = FakeClock()
    calls = retries(fake, deadline_seconds=1e4, max_failed_share=0.55)
    rule = (
        rf"^the first requests of 200 of the last {WINDOW} reads failed \(HTTP 503 \d+, cut \d+; the last one for "
        r"https://host/a\.tar\), more than data\.remote\.max_failed_share \(0\.55\) allows: repair the server or the"
    )

    def read_all():
        for _ in range(WINDOW):
            calls.call(ADDRESS, failing(2))
            calls.call(ADDRESS, failing(1, "cut"))

    with pytest.raises(RemoteError, match=rule):
        read_all()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_failures_up_to_the_share_end_nothing(share):
    calls = retries(FakeClock(), max_failed_share=share)
    for _ in range(2 * WINDOW):
        calls.call(ADDRESS, failing(1))
        calls.call(ADDRESS, failing(0))


def test_reads_that_wait_for_a_server_share_its_outage():
    """Each of many reads in progress repeats its requests often, but the server was away once."""
    fake = FakeClock()
    calls = retries(fake, deadline_seconds=300)
    for _ in range(WINDOW):
        calls.call(ADDRESS, failing(0))
    for _ in range(WINDOW // 2):
        calls.call(ADDRESS, failing(9))
    calls.call(ADDRESS, failing(0))


@pytest.mark.parametrize("ahead", [0, 16, 49, 128, 256])
def test_an_outage_fails_all_reads_in_progress_and_ends_nothing(ahead):
    calls = retries(FakeClock(), reads_ahead=ahead)
    for _ in range(5):
        for _ in range(2 * ahead):
            calls.call(ADDRESS, failing(0))
        for _ in range(ahead + 1):
            calls.call(ADDRESS, failing(3))


def test_a_request_that_does_not_end_is_left_alone_at_the_deadline():
    calls, released = Retries(RemoteConfig(deadline_seconds=0.2, reads_ahead=0), SYSTEM_CLOCK), threading.Event()
    try:
        with pytest.raises(RemoteError, match=r"^https://host/a\.tar cannot be read: too slow \(1 attempts in 0 s"):
            calls.call(ADDRESS, lambda end: released.wait(20))
    finally:
        released.set()


def test_a_timeout_of_a_request_itself_is_its_error():
    def request(end):
        raise TimeoutError("bug")

    with pytest.raises(TimeoutError, match=r"^bug$"):
        retries(FakeClock()).call(ADDRESS, request)


def test_another_error_is_not_repeated():
    fake = FakeClock()

    def request(end):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        retries(fake).call(ADDRESS, request)
    assert not fake.sleeps
