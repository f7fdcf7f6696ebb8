"""The command that hands a model on: `python -m ngpt.export RUN --to DIR` writes a folder that Hugging Face's libraries load."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ngpt.checkpoint.integrity import sync, write_durably
from ngpt.checkpoint.tensor_file import CheckpointError, Layout, write_tensors
from ngpt.config.llama_folder import CONFIG, INDEX, SINGLE, llama_config
from ngpt.export_check import check_export
from ngpt.hugging_face_tokenizer import tokenizer_files
from ngpt.model.cost import parameter_count
from ngpt.source_command import DTYPES, SOURCE_HELP, Parser, exit_code_of
from ngpt.trained import Source, find_source

EPILOG = """examples:
  python -m ngpt.export runs/quickstart --to exported
  python -m ngpt.export runs/quickstart/checkpoints/step-0000400 --to exported --dtype bf16 --verify
  python -m ngpt.export runs/llama_1b --to exported --max-shard-size 2GB --force

Afterwards, without network:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model, tokenizer = AutoModelForCausalLM.from_pretrained('exported'), AutoTokenizer.from_pretrained('exported')

exit codes: 0 done, 1 --verify found a difference, 2 a mistake in the command or a checkpoint that cannot be read"""

CARD, GENERATION = "README.md", "generation_config.json"
_OURS = re.compile(
    r"config\.json|README\.md|generation_config\.json|(tokenizer|special_tokens|added_tokens|spiece|model).*\.(json|model|safetensors)"
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "spiece.model", "special_tokens_map.json", "added_tokens.json", GENERATION)
EXIT_DIFFERENT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _parser() -> Parser:
    parser = Parser("python -m ngpt.export", description="Write a model in Hugging Face's layout.", epilog=EPILOG)
    parser.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write; it must be new, or see --force")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: as they were saved)")
    parser.add_argument("--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="largest file of weights (default 5GB)")
    parser.add_argument("--force", action="store_true", help="replace a folder that an export has written")
    parser.add_argument("--verify", action="store_true", help="load it with transformers, and compare its logits and token ids with ours")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: write a number and KB, MB or GB, such as 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _run(options: argparse.Namespace) -> int:
    source = find_source(options.source)
    dtype = source.dtype if options.dtype is None else DTYPES[options.dtype]
    try:
        files = export(source, options.to, dtype=dtype, max_shard_bytes=options.max_shard_size, force=options.force)
    except OSError as error:
        raise CheckpointError(f"--to {options.to}: it cannot be written ({error.strerror or error})") from error
    total = sum(size for _, size in files)
    _say(f"{source.name}: {parameter_count(source.config):,} parameters in {_dtype_name(dtype)}")
    for name, size in files:
        _say(f"  {options.to / name}  {size / 1e6:,.2f} MB")
    _say(f"{len(files)} files, {total / 1e6:,.1f} MB")
    if not options.verify:
        return 0
    check = check_export(options.to, source.tokenizer)
    for line in check.lines:
        _say(line)
    return 0 if check.passed else EXIT_DIFFERENT


def export(source: Source, to: Path, *, dtype: torch.dtype, max_shard_bytes: int, force: bool = False) -> list[tuple[str, int]]:
    """Write the folder: whole under its name, or not at all. Returns names and bytes of its files.

    Raises:
        CheckpointError: the folder is there, without `force` or with files that are not an export's.
        OSError: it cannot be written.
    """
    to = to.resolve()
    _check_free(to, force)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
    try:
        _write_weights(source, temporary, dtype, max_shard_bytes)
        for name, content in _other_files(source, dtype).items():
            write_durably(temporary / name, content)
        temporary.chmod(0o755)
        if to.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            to.rename(old)
            temporary.rename(to)
            shutil.rmtree(old)
        else:
            temporary.rename(to)
        sync(to.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [(path.name, path.stat().st_size) for path in sorted(to.iterdir())]


def _check_free(to: Path, force: bool) -> None:
    if not to.exists():
        return
    if not to.is_dir():
        raise CheckpointError(f"--to {to}: must be a folder, this is a file")
    names = sorted(path.name for path in to.iterdir())
    strangers = [name for name in names if not _OURS.fullmatch(name)]
    if strangers:
        raise CheckpointError(f"--to {to}: has files that no export has written ({strangers[0]}); give another folder")
    if names and not force:
        raise CheckpointError(f"--to {to}: is there already; give another folder, or --force to replace it")


# ------------------------------------------------------------------------------------------------------------------ content
def _write_weights(source: Source, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    layout = {name: (dtype, shape) for name, (_, shape) in source.weights.layout().items()}
    shards = list(_shards(layout, max_shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]

    def weights(shard: Layout) -> Iterator[tuple[str, Tensor]]:
        for name in shard:
            yield name, source.weights.read(name).to(dtype)

    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard, weights(shard), {"format": "pt"}, must_be_finite=lambda name: True)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_durably(folder / INDEX, _json({"metadata": {"total_size": _bytes(layout)}, "weight_map": where}))


def _shards(layout: Layout, most: int) -> Iterator[Layout]:
    """Tensors in their order, in parts of at most `most` bytes; a tensor that is larger is a part of its own."""
    part: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, entry in layout.items():
        if part and _bytes({**part, name: entry}) > most:
            yield part
            part = {}
        part[name] = entry
    yield part


def _bytes(layout: Layout) -> int:
    return sum(shape.numel() * dtype.itemsize for dtype, shape in layout.values())


def _other_files(source: Source, dtype: torch.dtype) -> dict[str, bytes]:
    tokenizer = source.tokenizer
    ids: dict[str, int | None] = {"bos_token_id": source.bos_id}
    if tokenizer is not None:
        ids |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    files = {
        CONFIG: _json(llama_config(source.config, dtype=_dtype_name(dtype), token_ids=ids)),
        GENERATION: _json({name: index for name, index in ids.items() if index is not None}),
        CARD: _card(source).encode(),
    }
    if source.run is None:  # from one folder of Hugging Face's layout to another: the tokenizer stays as it is
        return files | {path.name: path.read_bytes() for pattern in _TOKENIZER_FILES for path in source.folder.glob(pattern)}
    return files if tokenizer is None else files | tokenizer_files(tokenizer, max_tokens=source.config.max_seq_len)


def _card(source: Source) -> str:
    config, run = source.config, source.run
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {source.folder.name if run is None else run.run.name}",
        "",
        f"A LLaMA of {parameter_count(config):,} parameters: {config.num_hidden_layers} blocks, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.vocab_size:,} tokens, sequences of up to {config.max_seq_len:,}.",
    ]
    if run is not None:
        tokens = (source.step or 0) * run.trainer.global_batch_size * run.trainer.seq_len
        lines += ["", f"Trained with ngpt for {source.step:,} steps ({tokens:,} tokens) on data={run.data.name} with {run.optimizer.name}."]
        lines += ["", *_held_out(source)]
        lines += ["Texts were joined by the EOS, and none had a BOS before it: give the EOS where a prompt would be empty."]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _held_out(source: Source) -> Iterator[str]:
    """What the run measured on held-out text at the step, if it did."""
    path = source.folder.parent.parent / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line) if line.endswith("}") else {}
        if record.get("step") == source.step and record.get("val/loss") is not None:
            loss, perplexity = record["val/loss"], record["val/perplexity"]
            yield f"On {record['val/tokens']:,} held-out tokens: loss {loss:.4f} nats, perplexity {perplexity:.2f}."
            yield ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _json(tree: object) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
