"""Ranks of runs that break: the trainer itself has no switches for tests.

A program that imports the trainer once and then forks the ranks of one run after another, as many as it is asked for. A line of JSON on
stdin is an order (`ranks`, `settings`, `port`, `said`, `breaks`, `seconds`); a line on the file descriptor that it is given has the exit
codes. What breaks is written `kind@step#rank`, as in `kill@6`; rank 1 where none is given.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import ngpt.engine.deepspeed_engine
import ngpt.run
import ngpt.summary
import ngpt.train
from ngpt.checkpoint import store
from ngpt.checkpoint.contents import Contents
from ngpt.config.compose import compose_run
from ngpt.data.documents import DataError
from ngpt.data.train_loader import TrainLoader
from ngpt.engine.update_cycle import UpdateCycle
from ngpt.engine.zero_sharding import ShardedUpdates
from ngpt.loop.train_step import StepResult
from ngpt.run import Run

ngpt.summary.plot_run = lambda *_arguments, **_keywords: None
ngpt.train.SECONDS_FOR_RANK_0 = ngpt.train.SECONDS_FOR_SPEAKER = 1  # no launcher waits here to end the others


def die(*_given: Any, **_named: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, do: Callable[..., Any]) -> None:
    """Call `do(original, *arguments)` in place of the call with this number, from 1, of the function `name` of `owner`."""
    original, calls = getattr(owner, name), itertools.count(1)

    def instead(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            return do(original, *arguments, **keywords)
        return original(*arguments, **keywords)

    setattr(owner, name, instead)


def in_backward(step: int, do: Callable[[Tensor], Tensor]) -> None:
    """Have `do` in the place of the gradient of one matrix, in the backward of a step."""
    original = Run.steps

    def steps(self: Run) -> Iterator[StepResult]:
        weight = self.engine.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda gradient: do(gradient) if self.progress.step + 1 == step else gradient)
        return original(self)

    Run.steps = steps


def fail(error: BaseException) -> None:
    raise error


def stop_for_a_while(gradient: Tensor) -> Tensor:
    with subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)
    return gradient


def die_between_layers(step: Callable[..., None], updates: ShardedUpdates) -> None:
    at_call(ShardedUpdates, "_apply", 3, die)
    step(updates)


NOT_JSON = "shard-7.jsonl line 12: not JSON"
# What breaks, given the number of the step, or of the call, counted from 1. On two ranks a step is one micro-batch of each.
BREAKS = {
    "kill": lambda step: in_backward(step, die),
    "hang": lambda step: in_backward(step, lambda _: time.sleep(3600)),
    "stop": lambda step: in_backward(step, stop_for_a_while),
    "nan": lambda step: in_backward(step, lambda gradient: gradient * float("nan")),
    "inf": lambda step: in_backward(step, lambda gradient: gradient * float("inf")),
    "raise": lambda step: in_backward(step, lambda _: fail(ArithmeticError("no such number"))),
    "nan-loss": lambda step: at_call(UpdateCycle, "accumulate", step, lambda original, *given: original(*given) * float("nan")),
    "spike": lambda step: at_call(
        UpdateCycle, "finish_update", step, lambda original, cycle, loss, **given: original(cycle, loss * 100, **given)
    ),
    "kill-in-update": lambda step: at_call(ShardedUpdates, "step", step, die_between_layers),
    "data": lambda step: at_call(TrainLoader, "__next__", step, lambda *_: fail(DataError(NOT_JSON))),
    "kill-in-evaluation": lambda number: at_call(ngpt.run, "evaluate", number, die),
    "kill-in-save": lambda number: at_call(Contents, "write", number, die),
    "kill-before-mark": lambda number: at_call(store, "mark_complete", number, die),
    "full-disk": lambda number: at_call(Contents, "write", number, lambda *_: fail(OSError(errno.ENOSPC, "No space left on device"))),
}


def become(rank: int, order: dict[str, Any]) -> None:
    """Be this rank of a run, and end with its exit code."""
    code = 1
    try:
        said = os.open(f"{order['said']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"]}
        os.environ.update({name: str(value) for name, value in where.items()})
        for what in order["breaks"]:
            kind, number, of_rank = re.fullmatch(r"([a-z-]+)@(\d+)(?:#(\d+))?", what).groups("1")
            if int(of_rank) == rank:
                BREAKS[kind](int(number))
        sys.argv[1:] = order["settings"]
        ngpt.train.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(order: dict[str, Any]) -> list[int]:
    """The exit codes of the ranks of a run, negative for a signal. Those that take too long are killed."""
    ranks = []
    for rank in range(order["ranks"]):
        ranks.append(os.fork())
        if not ranks[-1]:
            become(rank, order)
    deadline, codes = time.monotonic() + order["seconds"], {}
    while len(codes) < len(ranks):
        for process in set(ranks) - codes.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in ranks]


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # which imports as much again, and so does the composer of settings
    compose_run(["data=synthetic", "trainer.max_steps=1"])
    answers = os.fdopen(int(sys.argv[1]), "w")  # not stdout, where DeepSpeed prints when it is imported
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()
