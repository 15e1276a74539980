"""The first signal asks, the second ends at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tnl.train.signals import StopSignals

TWICE = """
import os, signal, sys, time
from tnl.train.signals import StopSignals
stop = StopSignals()
with stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
    finally:
        print("never", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_only_asks(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    stop, before = StopSignals(), signal.getsignal(number)
    with stop:
        assert not stop.asked()
        os.kill(os.getpid(), number)
        assert stop.asked() and stop.exit_code == code
    assert signal.getsignal(number) is before
    assert "finished and saved first" in capfd.readouterr().err


def test_the_second_signal_ends_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and time.monotonic() - start < 1
    assert process.stdout.read() == ""


def test_in_another_thread_signals_are_left_alone() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with StopSignals():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures
