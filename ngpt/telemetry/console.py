"""What a person reads while a run goes on: one aligned line a log step, and the log file beside it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import WatchedFileHandler
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ngpt.config.durations import clock
from ngpt.config.redaction import redact
from ngpt.telemetry.metrics import Record


class _Redacted(logging.Formatter):
    """Log lines, and the tracebacks in them, without secrets: whatever a library puts into its messages."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _LastingFileHandler(WatchedFileHandler):
    """A log file that begins again where it, or its folder, is removed; no message is worth the run."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)


def configure_logging(run_folder: Path, *, rank: int = 0) -> None:
    """Send messages of INFO and above to standard output and to `train.log`; of other ranks than 0, warnings to `train.rank-N.log`."""
    file = run_folder / ("train.log" if rank == 0 else f"train.rank-{rank}.log")
    handlers: list[logging.Handler] = [_LastingFileHandler(file, encoding="utf-8", delay=rank > 0)]  # no file without a message
    handlers[0].setFormatter(_Redacted("%(asctime)s %(message)s"))
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[1].setFormatter(_Redacted("%(message)s"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=handlers, force=True)
    for chatty in ("datasets", "httpx", "httpx2", "huggingface_hub", "fsspec", "filelock", "matplotlib", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line would come twice


@contextmanager
def progress_bar(*, total_steps: int, done: int, shown: bool = True) -> Iterator[tqdm]:
    """A bar below the log lines where it is to be `shown` and standard output is a terminal; a bar that shows nothing anywhere else."""
    hidden = not (shown and sys.stdout.isatty())
    bar = tqdm(total=total_steps, initial=done, unit="step", dynamic_ncols=True, leave=False, file=sys.stdout, disable=hidden)
    with bar:
        if bar.disable:
            yield bar
        else:
            with logging_redirect_tqdm(tqdm_class=tqdm):
                yield bar


def step_line(record: Record, *, total_steps: int, seconds_left: float) -> str:
    """The console line of a training record, as wide for the last step as for the first."""
    step, width = int(record["step"] or 0), len(str(total_steps))
    return (
        f"step {step:>{width}}/{total_steps} ({step / total_steps:6.1%}) | loss {_number(record['train/loss'], '.4f'):>7} | "
        f"ppl {_number(record['train/perplexity'], '.1f'):>8} | lr {record['optim/lr']:.2e} | "
        f"gnorm {_number(record['optim/grad_norm'], '.2f'):>6} | "
        f"mem {(record['memory/peak_allocated_gib'] or 0):.2f}GiB | tok/s {round(record['throughput/tokens_per_sec'] or 0):>9,} | "
        f"mfu {record['throughput/mfu']:5.1%} | eta {clock(seconds_left)}"
    )


def eval_line(record: Record, *, total_steps: int) -> str:
    """The console line of an evaluation record."""
    bits = record.get("val/bits_per_byte")
    return (
        f"eval {int(record['step'] or 0):>{len(str(total_steps))}}/{total_steps} | val loss {_number(record['val/loss'], '.4f')} | "
        f"val ppl {_number(record['val/perplexity'], '.2f')} "
        f"(galore protocol {_number(record['val/perplexity_galore_protocol'], '.2f')}) | "
        + (f"{bits:.4f} bits/byte | " if bits is not None else "")
        + f"{int(record['val/tokens'] or 0):,} tokens in {record['time/eval_s']:.1f}s"
    )


def _number(value: float | None, spec: str) -> str:
    return "nan" if value is None else format(value, spec)
