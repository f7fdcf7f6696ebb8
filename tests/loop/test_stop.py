"""Signals become a request; the second one acts as it always did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ngpt.loop.stop import stop_on_signals


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


def test_a_second_ctrl_c_interrupts():
    """A second Ctrl-C | ends at once"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_sigterm_kills():
    """A second SIGTERM | ends at once"""
    program = textwrap.dedent("""
        import os, signal
        from ngpt.loop.stop import stop_on_signals
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout
