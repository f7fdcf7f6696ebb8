"""A rank of a run that breaks as BREAK says (`what@step`, on rank 1): the trainer itself has no switches for tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ngpt.run
import ngpt.summary
from ngpt.data.documents import DataError
from ngpt.data.train_loader import TrainLoader
from ngpt.train import main

what, _, at = os.environ.get("BREAK", "").partition("@")
mine = os.environ["RANK"] == "1"
ngpt.summary.plot_run = lambda *_args, **_kwargs: None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


original_steps = ngpt.run.Run.steps


def steps(self):
    def hook(grad):
        if self.progress.step + 1 == int(at):
            if what == "kill":
                die()
            if what == "hang":
                time.sleep(3600)
            if what == "nan":
                return grad * float("nan")
        return grad

    if mine and at:
        self.engine.model.model.layers[0].mlp.up_proj.weight.register_hook(hook)
    return original_steps(self)


ngpt.run.Run.steps = steps

if mine and what == "kill-in-evaluation":
    original_evaluate = ngpt.run.evaluate

    def evaluate(engine, batches, *arguments, **keywords):
        batches and die()
        return original_evaluate(engine, batches, *arguments, **keywords)

    ngpt.run.evaluate = evaluate

if mine and what == "data":
    original_next = TrainLoader.__next__
    count = 0

    def broken_next(self):
        global count
        count += 1
        if count == int(at):
            raise DataError("shard-7.jsonl line 12: not JSON")
        return original_next(self)

    TrainLoader.__next__ = broken_next

main()
