"""A run in a terminal and in a pipe: the bar, Ctrl-C, no colours."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

from ngpt.telemetry.console import progress_bar

TINY = [
    "model=llama_9m",
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "data=synthetic",
    "trainer.seq_len=32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "trainer.precision=fp32",
    "trainer.peak_flops=1e9",
    "trainer.max_steps=100000",
    "optimizer.rank=8",
    "eval.max_tokens=300",
    "logger.every_steps=1",
    "run.name=tiny",
]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_the_bar_is_shown_in_a_terminal_and_not_in_a_pipe(monkeypatch, stream, shown):
    out = stream()
    monkeypatch.setattr(sys, "stdout", out)
    with progress_bar(total_steps=3, done=1) as bar:
        bar.update()
        bar.refresh()
    assert ("2/3" in out.getvalue()) == shown
    assert shown or out.getvalue() == ""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_says_what_happens_saves_and_exits_with_130(tmp_path: Path):
    """Ctrl-C in a terminal | says what it does and how to be quicker, saves, exits with 130; no colours, forced or not"""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.environ |= {"FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}
        os.execv(sys.executable, [sys.executable, "-m", "ngpt.train", *TINY])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    said, pressed = "", False
    while True:
        try:
            said += os.read(terminal, 2**16).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if not pressed and "step      3/100000" in said:
            os.write(terminal, b"\x03")
            pressed = True
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    assert code == 130, said
    assert "SIGINT: finishing the step, saving, then exiting (again to exit at once, without saving)" in said
    assert "stopped by SIGINT" in said
    assert "/100000 [" in said  # the bar
    assert not COLOUR.search(said)
    assert (tmp_path / "runs/tiny/checkpoints/latest").exists()
