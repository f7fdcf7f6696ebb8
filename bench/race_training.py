"""One run of the race: python -m bench.race_training DIR SETTINGS (JSON). The race starts these; each writes one result file.

The corpus is tokenised once (`prepare`), and every run reads the same tokens: row i is tokens i * seq_len to (i + 1) * seq_len + 1 of all
documents joined by EOS, in an order that depends on the seed alone. Matrix products are bf16 if asked for, with fp32 weights, everything
else (attention, norms, loss, optimizer) fp32, in one thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from bench.race_methods import Racer
from data_prep.train_tokenizer import sample_documents, train_tokenizer
from ngpt.config.schema import ModelConfig
from ngpt.data.atomic import atomic_file
from ngpt.data.documents import SkippedDocuments
from ngpt.data.tokenizer import Tokenizer
from ngpt.model.layers import Linear
from ngpt.model.llama import LlamaForCausalLM, compile_blocks
from ngpt.model.loss import LanguageModelHead, chunked_cross_entropy
from ngpt.optim.lr_schedule import cosine

PRESETS = Path(__file__).parents[1] / "conf" / "model"
UNAVAILABLE = 3  # exit status: this method cannot be built (yet)
EVALUATIONS = 10  # in a run, each on the first `EVALUATION_TOKENS` of the held-out tokens; the final loss is on all of them
EVALUATION_TOKENS = 8192
_MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """All that a run's result depends on, but for the code."""

    name: str
    method: dict[str, Any]
    rate: float
    seed: int
    batch_tokens: int
    steps: int
    rest_rate: float
    model: str
    vocab_size: int
    seq_len: int
    products: str  # "bf16" or "fp32"
    compiled: bool
    data: str  # fingerprint

    def path(self, folder: Path) -> Path:
        """Where the result goes: a readable name, and a hash of all settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return folder / "runs" / f"{self.name}-b{self.batch_tokens}-n{self.steps}-lr{self.rate:g}-s{self.seed}-{digest}.json"


# ---------------------------------------------------------------------------------------------------------------- data
def prepare(folder: Path, files: list[str], vocab_size: int, held_out_tokens: int) -> str:
    """Train the tokenizer, tokenise the files, keep the last ones as held-out text; once. Returns the data's fingerprint.

    Held out are the first `held_out_tokens` of the last file, or of as many last files as it takes; training reads the others.
    """
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    stamp = hashlib.sha256(json.dumps([digests, vocab_size, held_out_tokens]).encode()).hexdigest()[:12]
    if not (folder / f"{stamp}-train.npy").exists():
        documents = [[d.text for d in sample_documents([file], 1 << 40, SkippedDocuments(100))] for file in files]
        tokenizer = Tokenizer(train_tokenizer((text for texts in documents[:-1] for text in texts), vocab_size))
        shards = [np.concatenate(tokenizer.encode_documents(texts)).astype(np.uint16) for texts in documents]
        held_out = shards.pop()
        while len(held_out) <= held_out_tokens and len(shards) > 1:
            held_out = np.concatenate([shards.pop(), held_out])
        for name, tokens in (("held_out", held_out[: held_out_tokens + 1]), ("train", np.concatenate(shards))):
            with atomic_file(folder / f"{stamp}-{name}.npy") as out:
                np.save(out, tokens)
    return stamp


class Rows:
    """Rows of seq_len + 1 tokens, neighbours sharing one, so that every token is predicted once."""

    def __init__(self, path: Path, seq_len: int) -> None:
        self._tokens = torch.from_numpy(np.load(path).astype(np.int64))
        self._seq_len = seq_len
        self.count = (len(self._tokens) - 1) // seq_len

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each (rows, seq_len)."""
        rows = self._tokens[indices[:, None] * self._seq_len + torch.arange(self._seq_len + 1)]
        return rows[:, :-1], rows[:, 1:]

    def order(self, seed: int, count: int) -> Tensor:
        """`count` row numbers: epoch after epoch, each in another random order."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([torch.randperm(self.count, generator=generator) for _ in range(-(-count // self.count))])[:count]


# --------------------------------------------------------------------------------------------------------------- model
def build_model(name: str, vocab_size: int, seq_len: int, seed: int, products: str, compiled: bool = False) -> LlamaForCausalLM:
    """The preset with another vocabulary, initialised from the seed."""
    shape = {k: v for k, v in yaml.safe_load((PRESETS / f"{name}.yaml").read_text()).items() if k != "defaults"}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(ModelConfig(**{**shape, "vocab_size": vocab_size, "max_seq_len": seq_len}), loss_chunk_tokens=1 << 20)
    if products == "bf16":
        for module in model.modules():
            if isinstance(module, LanguageModelHead):
                module.forward = partial(_bf16_head, module)
            elif isinstance(module, Linear):
                module.forward = partial(_bf16_linear, module)
    if compiled:
        compile_blocks(model)
    return model


def _bf16_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), module.weight.bfloat16()).float()


def _bf16_head(module: LanguageModelHead, x: Tensor, labels: Tensor) -> Tensor:
    """The logits' softmax and the loss are fp32 inside, whatever comes in."""
    return chunked_cross_entropy(x.bfloat16(), module.weight.bfloat16(), labels, chunk_tokens=module.loss_chunk_tokens)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows, tokens: int | None = None) -> float:
    """Mean loss, nats per token, on the first `tokens` (None: all)."""
    seq_len = rows.take(torch.zeros(1, dtype=torch.int64))[0].shape[1]
    count = rows.count if tokens is None else min(rows.count, max(1, tokens // seq_len))
    total = sum(model(*rows.take(part)).item() for part in torch.arange(count).split(max(1, _MICRO_BATCH_TOKENS // seq_len)))
    return total / (count * seq_len)


# ----------------------------------------------------------------------------------------------------------------- run
def train(settings: Settings, folder: Path) -> dict[str, Any]:
    """The run: {"settings", "curve": [[tokens, loss]...], "final_loss", "state_bytes", "matrix_state_bytes", seconds per step}.

    Seconds are of this process's processor time, which other processes disturb less than the clock. A loss that is no number ends the run.
    """
    train_rows, held_out = (Rows(folder / f"{settings.data}-{part}.npy", settings.seq_len) for part in ("train", "held_out"))
    model = build_model(settings.model, settings.vocab_size, settings.seq_len, settings.seed, settings.products, settings.compiled)
    gap = 100 if settings.steps >= 500 else max(1, settings.steps // 5)
    width = model.config.hidden_size
    racer = Racer(settings.method, model, width=width, rate=settings.rate, rest_rate=settings.rest_rate, gap=gap)
    rows = settings.batch_tokens // settings.seq_len
    micro = max(1, _MICRO_BATCH_TOKENS // settings.seq_len)
    curve, began, optimizer_seconds, evaluation_seconds = [], time.process_time(), 0.0, 0.0
    for step, batch in enumerate(train_rows.order(settings.seed, settings.steps * rows).split(rows)):
        for part in batch.split(micro):
            loss = model(*train_rows.take(part)) / settings.batch_tokens
            loss.backward()
        before = time.process_time()
        racer.step(cosine(step, total_steps=settings.steps, warmup_steps=settings.steps // 10, min_lr_ratio=0.1))
        optimizer_seconds += time.process_time() - before
        if not math.isfinite(loss.item()):
            break
        if (step + 1) * EVALUATIONS // settings.steps > step * EVALUATIONS // settings.steps:
            before = time.process_time()
            curve.append([(step + 1) * settings.batch_tokens, held_out_loss(model, held_out, EVALUATION_TOKENS)])
            evaluation_seconds += time.process_time() - before
    seconds = time.process_time() - began - evaluation_seconds
    final, state = held_out_loss(model, held_out), racer.state_bytes()
    return {
        "settings": asdict(settings),
        "commit": commit(),
        "curve": curve,
        "final_loss": final if math.isfinite(final) else None,
        "state_bytes": state["all"],
        "matrix_state_bytes": state["matrices"],
        "seconds_per_step": seconds / (step + 1),
        "optimizer_seconds_per_step": optimizer_seconds / (step + 1),
    }


def commit() -> str:
    """The commit of the code, with a + if files differ from it; "unknown" outside a checkout."""
    run = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    head = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return f"{head or 'unknown'}{'+' if changed else ''}"


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    folder, settings = Path(argv[0]), Settings(**json.loads(argv[1]))
    try:
        result = train(settings, folder)
    except ValueError as error:
        print(error)
        return UNAVAILABLE
    with atomic_file(settings.path(folder)) as out:
        out.write(json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
