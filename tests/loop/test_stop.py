"""Signals become a request; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ngpt.loop.stop import SECONDS_OF_ONE_REQUEST, stop_on_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_recorded_with_its_exit_code_and_handlers_are_restored(number, code):
    """SIGTERM, SIGUSR1, SIGINT | remembered until the step is done; exit codes 75, 75, 130"""
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop()
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal == number
        assert stop.exit_code == code
    assert signal.getsignal(number) == before


def test_what_a_launcher_passes_on_is_the_same_request():
    """Ctrl-C in a terminal reaches launcher and ranks, and the ranks again from the launcher | one request, saved"""
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        assert stop.exit_code == 130


def test_a_second_signal_ends_the_process_at_once_in_the_middle_of_a_long_step():
    """A second Ctrl-C while the main thread computes or waits for other ranks | ends at once"""
    program = textwrap.dedent("""
        import hashlib, logging, time
        from ngpt.loop.stop import stop_on_signals
        logging.basicConfig()
        with stop_on_signals() as stop:
            print("ready", flush=True)
            while not stop():
                time.sleep(0.01)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes in which no handler of Python's runs
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stderr
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            first = process.stderr.readline()
            assert "SIGINT: finishing the step, saving, then exiting (again to exit at once, without saving)" in first
            time.sleep(SECONDS_OF_ONE_REQUEST + 0.2)
            assert process.poll() is None
            asked = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
            assert time.monotonic() - asked < 5
            assert "SIGINT again: exiting at once" in process.stderr.read()
        finally:
            process.kill()
