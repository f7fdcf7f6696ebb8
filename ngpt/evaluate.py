"""The command that measures a model: `python -m ngpt.evaluate RUN --data 'text/*.jsonl'`: perplexity, bits per byte, lm-eval's tasks."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.checkpoint.integrity import step_of
from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config.schema import BuiltinDataConfig, DataConfig, EvalConfig, LocalC4DataConfig, TokenizedDataConfig
from ngpt.data.atomic import atomic_file
from ngpt.data.batch import Batch
from ngpt.data.loader import build_eval_batches
from ngpt.dist.collectives import Collectives
from ngpt.dist.ranks import Ranks
from ngpt.loop.evaluate import EvalResult, evaluate
from ngpt.model.llama import LlamaForCausalLM
from ngpt.source_command import DTYPES, Parser, device_of, dtype_of, exit_code_of, positive
from ngpt.telemetry.metrics import eval_record
from ngpt.trained import Source, Trained, checkpoints_of, find_source

EPILOG = """examples:
  python -m ngpt.evaluate runs/quickstart                                  its own held-out text: val/loss of the run again
  python -m ngpt.evaluate runs/quickstart --steps all
  python -m ngpt.evaluate runs/quickstart --data 'other/*.jsonl' --max-tokens 1_000_000 --json scores.json
  python -m ngpt.evaluate exported --builtin --dtype bf16
  python -m ngpt.evaluate runs/llama_1b --tasks hellaswag,arc_easy         needs the extra [eval]: lm-eval

--data takes text (*.jsonl, *.json.gz, *.json.zst: one object with `text` a line) and folders of token shards.
exit codes: 0 done, 2 a mistake in the command, the data or a checkpoint"""

_BUILTIN_HELD_OUT = 20  # as conf/data/builtin.yaml holds out, so that no run with data=builtin was trained on it


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        "python -m ngpt.evaluate", description="Perplexity and bits per byte of a model on text, or lm-eval's tasks.", epilog=EPILOG
    )
    parser.add_source()
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--data", nargs="+", metavar="GLOB", help="text or token shards (default: the run's own held-out text)")
    text.add_argument("--builtin", action="store_true", help="held-out prose of Python's own documentation")
    parser.add_argument("--steps", default=None, metavar="all|N,N", help="checkpoints of a run folder (default: the newest)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="tokens to evaluate on (default: as the run, else 10,000,000)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="sequences at a time (default: as the run, else 16)")
    parser.add_argument(
        "--seq-len", type=positive, metavar="N", help="tokens of a sequence (default: as the run, else the model's longest)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    tasks = parser.add_argument_group("lm-eval")
    tasks.add_argument("--tasks", metavar="A,B", help="run these tasks instead")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files of your own")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    tasks.add_argument("--limit", type=positive, metavar="N", help="questions of each task (default: all)")
    return parser


def _run(options: argparse.Namespace) -> int:
    sources = _chosen(options)
    report = _tasks(options, sources) if options.tasks else _perplexity(options, sources)
    if options.json:
        with atomic_file(options.json) as out:
            out.write((json.dumps(report, indent=1) + "\n").encode())
    return 0


def _chosen(options: argparse.Namespace) -> list[Path]:
    """The checkpoints that --steps asks for."""
    if options.steps is None:
        return [options.source]
    there = {step_of(folder): folder for folder in checkpoints_of(options.source)}
    if not there:
        raise CheckpointError(f"--steps {options.steps}: {options.source} is no run folder with checkpoints")
    if options.steps == "all":
        return list(there.values())
    wanted = options.steps.split(",")
    missing = [step for step in wanted if not step.isdigit() or int(step) not in there]
    if missing:
        raise CheckpointError(f"--steps {options.steps}: there is no step {missing[0]}; there are {', '.join(map(str, there))}")
    return [there[int(step)] for step in wanted]


# --------------------------------------------------------------------------------------------------------------- perplexity
class _Evaluated:
    """A model in the place of an engine, for `ngpt.loop.evaluate`."""

    def __init__(self, model: LlamaForCausalLM, device: torch.device) -> None:
        self.device = device
        self._model = model

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._model(**{name: value.to(self.device) for name, value in inputs.items()})


def _perplexity(options: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    device, batches, records = device_of(options), None, []
    for folder in folders:
        source = find_source(folder)
        if batches is None:
            batches = read_batches(source, options)
            dtype = options.dtype or next((name for name, kind in DTYPES.items() if kind is source.dtype), str(source.dtype))
            _say(f"{source.name} on {_name_of_data(options, source)}, {dtype} on {device.type}")
            _say(f"{'step':>9}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'tokens':>11}  {'seconds':>7}")
        started = time.perf_counter()
        result = score(source, batches, device=device, dtype=dtype_of(options))
        tokens = 0 if source.run is None else (source.step or 0) * source.run.trainer.global_batch_size * source.run.trainer.seq_len
        records.append(eval_record(source.step or 0, tokens, result, seconds=time.perf_counter() - started))
        _say(_row(source.step, result, records[-1]["time/eval_s"] or 0))
    assert batches is not None
    return {"source": str(options.source), "data": _name_of_data(options, source), "results": records}


def _row(step: int | None, result: EvalResult, seconds: float) -> str:
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    shown = "" if step is None else f"{step}"
    return f"{shown:>9}  {result.loss:>8.4f}  {result.perplexity:>10.2f}  {bits:>9}  {result.tokens:>11,}  {seconds:>7.1f}"


def score(source: Source, batches: Sequence[Batch], *, device: torch.device, dtype: torch.dtype | None) -> EvalResult:
    """Held-out loss as training computes it. Raises CheckpointError."""
    model = source.load(device=device, dtype=dtype)
    token_bytes = source.tokenizer.token_bytes if source.tokenizer else None
    return evaluate(_Evaluated(model, device), batches, token_bytes, Collectives())


def read_batches(source: Source, options: argparse.Namespace) -> list[Batch]:
    """The tokens to evaluate on, in rows as the run had them. Raises DataError, or CheckpointError for lengths that do not fit."""
    run, longest = source.run, source.config.max_seq_len
    seq_len = options.seq_len or (run.trainer.seq_len if run else longest)
    if seq_len > longest:
        raise CheckpointError(f"--seq-len {seq_len}: the model's longest sequence is {longest} tokens")
    return build_eval_batches(
        _data(source, options),
        source.tokenizer,
        vocab_size=source.config.vocab_size,
        seq_len=seq_len,
        micro_batch_size=options.batch_size or (run.trainer.micro_batch_size if run else 16),
        max_tokens=options.max_tokens or (run.eval.max_tokens if run else EvalConfig().max_tokens),
        seed=run.seed if run else 0,
        ranks=Ranks(),
    )


def _data(source: Source, options: argparse.Namespace) -> DataConfig:
    """What to read: the run's own data, or all that --data names, in rows of the same kind."""
    own = source.run.data if source.run else None
    kind = {} if own is None else {"packing": own.packing, "mask_documents": own.mask_documents}
    if options.builtin:
        return own if isinstance(own, BuiltinDataConfig) else BuiltinDataConfig(holdout_every=_BUILTIN_HELD_OUT, **kind)
    if options.data:
        paths = [path for pattern in options.data for path in glob.glob(os.path.expanduser(pattern), recursive=True)]
        shards = any(os.path.isdir(path) or os.path.basename(path) == "manifest.json" for path in paths)
        files: dict[str, Any] = {"train_files": options.data, "val_files": options.data}  # all documents of what is named
        return TokenizedDataConfig(**files, **kind) if shards else LocalC4DataConfig(**files, **kind)
    if own is None:
        raise CheckpointError(f"{source.folder} is not of a run, so it has no held-out text: give --data GLOB or --builtin")
    return own


def _name_of_data(options: argparse.Namespace, source: Source) -> str:
    if options.builtin:
        return "builtin prose"
    return " ".join(options.data) if options.data else f"the run's held-out text (data={source.run.data.name if source.run else ''})"


# -------------------------------------------------------------------------------------------------------------------- tasks
def _tasks(options: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    if importlib.util.find_spec("lm_eval") is None:
        raise CheckpointError("--tasks needs lm-eval, which is an extra: pip install -e '.[eval]'")
    if options.data or options.builtin:
        raise CheckpointError("--tasks brings its own text: leave --data and --builtin out")
    from ngpt.harness import run_tasks  # lm-eval is optional, and slow to import

    report = {}
    for folder in folders:
        source = find_source(folder)
        trained = Trained(source.load(device=device_of(options), dtype=dtype_of(options)), source)
        results, table = run_tasks(
            trained,
            options.tasks.split(","),
            batch_size=options.batch_size or 16,
            include_path=options.include_path,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
        )
        _say(f"{source.name}\n{table}")
        report[source.name] = results
    return {"source": str(options.source), "tasks": report}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
