"""Our model as lm-eval sees one: the trainer's own model and SentencePiece, with lm-eval's way of cutting texts into context and rest.

No export is in between, so what is scored is what was trained. Needs the extra `[eval]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.generation import Choice, TextStream, generate
from ngpt.trained import Trained

_TOKENS_OF_AN_ANSWER = 256  # where a task sets no limit, as lm-eval's own models have it


class HarnessModel(TemplateLM):
    """Scores and writes text for lm-eval.

    Args:
        batch_size: sequences that are scored together.
    """

    def __init__(self, trained: Trained, *, batch_size: int) -> None:
        super().__init__()
        self._trained, self._text, self._batch_size = trained, trained.tokenizer, batch_size
        self._device = trained.device
        self.max_length = trained.source.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that follows nothing: the BOS of models that know one, for ours the EOS, which parts documents."""
        bos = self._trained.source.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Token ids; behind the BOS, where the model knows one and it is not unwanted."""
        bos = self._trained.source.bos_id
        return ([] if bos is None or add_special_tokens is False else [bos]) + self._text.encode([string])[0]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would say itself. Long contexts lose their beginning."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        for first in range(0, len(order), self._batch_size):
            chosen = order[first : first + self._batch_size]
            pairs = [(requests[i][1], requests[i][2][-self.max_length :]) for i in chosen]
            rows = [torch.tensor((context + rest)[-self.max_length - 1 :], device=self._device) for context, rest in pairs]
            # Padding stands behind the text, where causal attention does not look.
            hidden = self._trained.model.model(pad_sequence([row[:-1] for row in rows], batch_first=True))
            for i, row, state, (_, rest) in zip(chosen, rows, hidden, pairs, strict=True):
                labels = row[len(row) - len(rest) :]
                logits = self._trained.model.lm_head(state[len(row) - 1 - len(rest) : len(row) - 1]).float()
                loss = F.cross_entropy(logits, labels, reduction="sum")
                results[i] = (-loss.item(), bool((logits.argmax(dim=-1) == labels).all()))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self._text.encode([request.args[0]])[0],
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scores = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(score for score, _ in scores))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's stop strings; greedy, unless the task asks for `do_sample`."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        most = min(int(settings.get("max_gen_toks", _TOKENS_OF_AN_ANSWER)), self.max_length - 1)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - most) :]
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        choice = Choice(temperature, int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0)))
        stream, text = TextStream(self._text, ids), ""
        for (token,) in generate(self._trained.model, ids, choice, num_tokens=most, seed=0, eos_id=self.eot_token_id):
            assert token is not None
            text += stream.add(token)
            if any(stop in text for stop in stops):
                break
        else:
            text += stream.rest()
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Of the user's own tasks alone, if these are enough: to read the thousands of lm-eval's takes half a minute."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_tasks(
    trained: Trained, tasks: Sequence[str], *, batch_size: int, include_path: Path | None, num_fewshot: int | None, limit: int | None
) -> tuple[dict[str, Any], str]:
    """Results by task as lm-eval gives them, and its table. Raises CheckpointError for a task that is not known."""
    manager = _task_manager(tasks, include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise CheckpointError(
            f"--tasks {unknown[0]}: lm-eval knows no such task; --include-path names a folder with task files of your own"
        )
    model = HarnessModel(trained, batch_size=batch_size)
    found = simple_evaluate(model=model, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False)
    assert found is not None  # only other ranks get none
    return found["results"], make_table(found)
