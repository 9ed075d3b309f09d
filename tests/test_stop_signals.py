"""Signals that end a command: an exception before training, a record during training."""

import os
import signal
import threading

import pytest

from eve_ds.signals import STOP_SIGNALS, Stopped, StopSignals, held_signals, ignore_stop_signals


@pytest.fixture(autouse=True)
def interruptible():
    """Handle SIGINT, which the tests ignore if they run as a background job of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


every_signal = pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)


@every_signal
def test_the_first_signal_raises_and_later_ones_change_nothing(number):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopSignals() as stop, pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert (stop.requested, caught.value.name) == (True, number.name)
    with stop:
        os.kill(os.getpid(), number)  # a launcher repeats it during the cleanup
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


@every_signal
def test_a_deferred_signal_is_recorded_and_named_once(number):
    with StopSignals() as stop:
        stop.defer()
        assert (stop.requested, stop.take_name()) == (False, None)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.take_name(), stop.take_name()) == (True, number.name, None)


def test_no_handler_for_errors_catches_a_signal():
    assert not issubclass(Stopped, Exception)
    assert issubclass(Stopped, KeyboardInterrupt)


def test_nested_contexts_restore_each_other():
    with StopSignals() as stop:
        stop.defer()
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_background_jobs_of_scripts_go_on_ignoring_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_process_whose_code_is_decided_ignores_signals():
    child = os.fork()
    if not child:
        ignore_stop_signals()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_held_signal_raises_at_the_end_of_the_context(number):
    def hold():
        with held_signals():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            reached.append(number)

    reached = []
    with StopSignals() as stop:
        before = [signal.getsignal(other) for other in STOP_SIGNALS]
        with pytest.raises(Stopped) as caught:
            hold()
        assert (reached, caught.value.number, stop.requested) == ([number], number, True)
        assert [signal.getsignal(other) for other in STOP_SIGNALS] == before


def test_held_signals_change_nothing_for_other_threads_and_other_handlers():
    def hold():
        with held_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    found, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert found == [before]
    with StopSignals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
