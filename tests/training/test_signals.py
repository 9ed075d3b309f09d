"""Signals that stop a run: recorded in the handler, logged outside of it."""

import os
import signal

from eve_ds.training.signals import StopSignals


def test_a_signal_is_logged_once_and_not_inside_its_handler(caplog):
    with StopSignals() as stop:
        stop.log()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert caplog.messages == [], "the handler may interrupt another write to the log"
        stop.log()
        stop.log()
    assert caplog.messages == ["SIGUSR1: saving and stopping after this step or the next"]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
