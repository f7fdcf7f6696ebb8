"""Rules about what is on disk: the tokenizer, the globs of shards, the checkpoint to resume from, packages that a setting needs.

Only the tokenizer is opened, because its vocabulary must fit the model's.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from ngpt.config.llama_folder import INDEX, SINGLE, NotLlama, differences, read_llama_config
from ngpt.config.problems import problem
from ngpt.config.schema import LocalC4DataConfig, ModelConfig, RunConfig, TokenizedDataConfig
from ngpt.config.suggest import nearest

_LARGEST_MODEL_BYTES = 2**28  # the largest models known have some 10 MB; anything else must not be read into memory


def file_problems(config: RunConfig) -> Iterator[str]:
    """A line for every path of `config` that is missing or of the wrong kind."""
    yield from _tokenizer_problems(config)
    yield from _initial_weights_problems(config.model)
    if isinstance(config.data, LocalC4DataConfig | TokenizedDataConfig):
        yield from _shard_problems(config.data)
    yield from _resume_problems(config.resume)
    if os.path.exists(config.run.dir) and not os.path.isdir(config.run.dir):
        yield problem("run.dir", config.run.dir, "must be a folder, this is a file", "set run.dir=runs")
    if config.logger.tensorboard and importlib.util.find_spec("tensorboard") is None:
        rule = "needs the package tensorboard, which is not installed"
        yield problem("logger.tensorboard", True, rule, "`pip install tensorboard`, or leave it out: `python -m ngpt.report RUN` draws too")


def vocabulary_problem(model_vocab: int, tokenizer_vocab: int) -> str | None:
    """The line for a model with fewer rows in its embedding than the tokenizer has pieces; None where it fits."""
    if model_vocab >= tokenizer_vocab:
        return None
    rule = f"must be at least the number of the tokenizer's pieces, {tokenizer_vocab}"
    fix = f"set model.vocab_size={tokenizer_vocab}, or tokenizer.path to a smaller tokenizer"
    return problem("model.vocab_size", model_vocab, rule, fix)


def _tokenizer_problems(config: RunConfig) -> Iterator[str]:
    path = config.tokenizer.path
    if path is not None and os.path.isfile(os.path.expanduser(path)):
        yield from _content_problems(path, config.model.vocab_size)
    elif path is not None or config.data.name != "synthetic":
        yield _missing_tokenizer(config)


def _content_problems(path: str, model_vocab: int) -> Iterator[str]:
    # Imported on use: a native library (without torch) that only runs on text need.
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    try:
        if os.path.getsize(os.path.expanduser(path)) > _LARGEST_MODEL_BYTES:
            raise RuntimeError("too large")
        tokenizer.LoadFromSerializedProto(Path(path).expanduser().read_bytes())
    except OSError as error:
        yield problem("tokenizer.path", path, f"cannot be read ({error.strerror})", "make the file readable, or give another one")
        return
    except RuntimeError:
        fix = "give one that `python -m data_prep.train_tokenizer` wrote, or spiece.model of t5-base from the hub"
        yield problem("tokenizer.path", path, "is no SentencePiece model", fix)
        return
    if tokenizer.eos_id() < 0:
        yield problem("tokenizer.path", path, "has no EOS, which closes every document", "train the model with eos_id >= 0")
    if too_small := vocabulary_problem(model_vocab, tokenizer.vocab_size()):
        yield too_small


def _missing_tokenizer(config: RunConfig) -> str:
    """The line for a tokenizer that is not there, with the command that trains one on the text of the run."""
    path = config.tokenizer.path
    target = "tokenizer.model"
    if path is None:
        rule = f"data={config.data.name} needs a SentencePiece model"
    elif os.path.isdir(path):
        rule = "must be a SentencePiece .model file, this is a folder"
    else:
        rule, target = "no such file", path
    source = "--files 'GLOB'"
    if config.data.name == "builtin":
        source = "--builtin"
    elif isinstance(config.data, LocalC4DataConfig) and config.data.train_files:
        source = f"--files {' '.join(repr(pattern) for pattern in config.data.train_files)}"
    fix = f"train one: python -m data_prep.train_tokenizer {source} --vocab-size {config.model.vocab_size} --out {target}"
    if os.path.basename(target) == "spiece.model":
        fix = f"bring spiece.model of t5-base from the hub, or {fix}"
    return problem("tokenizer.path", path, rule, fix if target == path else f"{fix} and set tokenizer.path={target}")


def _initial_weights_problems(model: ModelConfig) -> Iterator[str]:
    """One line with every field in which the model differs from the folder that it begins with, and the settings that agree with it."""
    if model.init_from is None:
        return
    path, folder = "model.init_from", Path(model.init_from).expanduser()
    try:
        theirs = read_llama_config(folder)
    except NotLlama as error:
        yield problem(path, model.init_from, str(error), "give a LLaMA folder, or null (a run that is resumed does not read it)")
        return
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        rule = f"has no {SINGLE} and no {INDEX}; pickles (*.bin) are programs and are not read"
        yield problem(path, model.init_from, rule, "convert the weights to safetensors")
    if found := differences(model, theirs):
        values = {name: str(value).lower() if isinstance(value, bool) else f"{value}" for name, (_, value) in found.items()}
        rule = "must have the model's shape, it has " + ", ".join(
            f"{name} = {value} (not {found[name][0]})" for name, value in values.items()
        )
        yield problem(path, model.init_from, rule, "set " + " ".join(f"model.{name}={value}" for name, value in values.items()))


def _shard_problems(data: LocalC4DataConfig | TokenizedDataConfig) -> Iterator[str]:
    fix = "set data.{}='[" + ("corpus/*.json.gz" if isinstance(data, LocalC4DataConfig) else "tokens/*") + "]'"
    if not data.train_files:
        yield problem("data.train_files", [], f"data={data.name} needs files to train on", fix.format("train_files"))
    matches: dict[str, set[str]] = {}
    for setting, patterns in (("train_files", data.train_files), ("val_files", data.val_files)):
        found = {pattern: glob.glob(os.path.expanduser(pattern), recursive=True) for pattern in patterns}
        matches[setting] = {_identity(name) for names in found.values() for name in names}
        for pattern in (pattern for pattern, names in found.items() if not names):
            yield problem(f"data.{setting}", pattern, f"matches no file (working directory {os.getcwd()})", fix.format(setting))
    shared = sorted(matches["train_files"] & matches["val_files"])
    if shared:
        rule = f"must share no file with train_files, both match {shared[0]}" + (f" and {len(shared) - 1} more" if shared[1:] else "")
        yield problem("data.val_files", data.val_files, rule, "narrow one of the globs")


def _identity(name: str) -> str:
    """One name for a file however it was written, and for a folder of token shards and its manifest."""
    path = os.path.realpath(name)
    return os.path.dirname(path) if os.path.basename(path) == "manifest.json" else path


def _resume_problems(resume: str) -> Iterator[str]:
    if resume in ("auto", "never"):
        return
    if not os.path.isdir(resume):
        guess = nearest(resume, ("auto", "never"))
        fix = f"did you mean resume={guess}?" if guess else "set resume=runs/NAME/checkpoints/step-0001000"
        yield problem("resume", resume, "must be auto, never or an existing step folder", fix)
    elif os.path.isdir(os.path.join(resume, "checkpoints")):
        fix = f"set resume=auto with run.name={Path(resume).name}, or resume={resume}/checkpoints/step-..."
        yield problem("resume", resume, "must be a step folder, this is a run folder", fix)
    elif not os.path.exists(os.path.join(resume, ".complete")):
        yield problem("resume", resume, "is no finished checkpoint, it has no file .complete", "choose another step folder, or resume=auto")
