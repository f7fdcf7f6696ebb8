"""Texts that the model writes while it is trained (`eval.sample_prompts`): the same prompts and seeds at every evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ngpt.config.problems import ConfigError, problem
from ngpt.config.schema import EvalConfig
from ngpt.data.tokenizer import Tokenizer
from ngpt.generation import Choice, TextStream, encode_prompt, generate
from ngpt.model.llama import LlamaForCausalLM
from ngpt.telemetry.sinks import JsonlSink

logger = logging.getLogger(__name__)

_SHOWN = 300  # characters of a text on the console; samples.jsonl has all of it


class Samples:
    """Writes samples.jsonl of a run folder, and a line for each text on the console. For rank 0, which has all weights below stage 3.

    Training does not notice: no generator but the samples' own is drawn from, and weights are read only.

    Args:
        path: of samples.jsonl; records past `resume_step` are dropped from it.
        seed: with the number of the prompt, what a text depends on beside the weights.

    Raises:
        ConfigError: a prompt leaves no room in the model's longest sequence.
    """

    def __init__(self, config: EvalConfig, tokenizer: Tokenizer, *, max_seq_len: int, path: Path, seed: int, resume_step: int) -> None:
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._prompts = [(text, encode_prompt(tokenizer, text, None)) for text in config.sample_prompts]
        for text, ids in self._prompts:
            if (length := len(ids) + config.sample_tokens) > max_seq_len:
                rule = f"is {len(ids)} tokens long, and with eval.sample_tokens = {config.sample_tokens} longer than model.max_seq_len"
                fix = f"a shorter one, or model.max_seq_len={length}"
                raise ConfigError([problem("eval.sample_prompts", text[:40], f"{rule} = {max_seq_len}", fix)])
        self._sink = JsonlSink(path, resume_step=resume_step)

    def write(self, model: LlamaForCausalLM, *, step: int, tokens: int) -> None:
        """Continue all prompts with the weights as they are."""
        training = model.training
        model.eval()
        for number, (prompt, ids) in enumerate(self._prompts):
            text = self._text(model, ids, self._seed + number)
            self._sink.write({"step": step, "tokens": tokens, "prompt": prompt, "text": text})
            shown = json.dumps(prompt + text, ensure_ascii=False)  # a line, whatever the text
            logger.info("sample %d | %s", step, shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + '…"')
        model.train(training)

    def rewind(self, step: int) -> None:
        """Drop the texts past `step`, to which the run has gone back."""
        self._sink.rewind(step)

    def close(self) -> None:
        self._sink.close()

    def _text(self, model: LlamaForCausalLM, ids: list[int], seed: int) -> str:
        stream, choice = TextStream(self._tokenizer, ids), Choice(self._config.sample_temperature)
        rows = generate(model, ids, choice, num_tokens=self._config.sample_tokens, seed=seed, eos_id=self._tokenizer.eos_id)
        return "".join(stream.add(token) for (token,) in rows if token is not None) + stream.rest()
