"""The command that writes text: `python -m ngpt.generate RUN --prompt 'Once upon a time'`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.generation import Choice, TextStream, encode_prompt, generate
from ngpt.source_command import Parser, exit_code_of, open_source, positive
from ngpt.trained import Trained

EPILOG = """examples:
  python -m ngpt.generate runs/quickstart --prompt 'The function returns'
  python -m ngpt.generate runs/quickstart --prompt 'The function' --temperature 0           the most probable text
  python -m ngpt.generate runs/quickstart --prompt 'The' --samples 3 --top-p 0.9 --seed 1
  python -m ngpt.generate runs/quickstart/checkpoints/step-0000400 < prompts.txt            a prompt a line
  python -m ngpt.generate exported --prompt 'The' --device cpu --dtype fp32

The text goes to the standard output as it is made, all else to the standard error output.
exit codes: 0 done, 2 a mistake in the command or a checkpoint that cannot be read"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _parser() -> Parser:
    parser = Parser("python -m ngpt.generate", description="Write text with a trained model, as it is made.", epilog=EPILOG)
    parser.add_source()
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="how the text begins; may be given again (default: lines of stdin)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="most tokens of each text (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: most probable; 1: as the model has it (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K most probable tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the most probable tokens of together P (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--samples", type=positive, default=1, metavar="N", help="texts for each prompt; several are shown when done")
    parser.add_argument("--ignore-eos", action="store_true", help="go on where the model would end the document")
    return parser


def _run(options: argparse.Namespace) -> int:
    try:
        choice = Choice(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise CheckpointError(f"--{error}") from error
    prompts = options.prompt if options.prompt is not None else _lines_of_stdin()
    trained = open_source(options)
    for number, prompt in enumerate(prompts):
        if number:
            _say("\n")
        _continue(trained, prompt, choice, options)
    return 0


def _lines_of_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise CheckpointError("no prompt: give --prompt TEXT, or prompts on the standard input, one a line")
    return [line.rstrip("\n") for line in sys.stdin]


def _continue(trained: Trained, prompt: str, choice: Choice, options: argparse.Namespace) -> None:
    """Show the texts that follow one prompt: a single one as it comes, several when they are done."""
    tokenizer, config = trained.tokenizer, trained.source.config
    ids = encode_prompt(tokenizer, prompt, trained.source.bos_id)
    if len(ids) >= config.max_seq_len:
        longest = f"the model's longest sequence is {config.max_seq_len} tokens"
        raise CheckpointError(f"the prompt has {len(ids)} tokens, and {longest}: give a shorter one")
    tokens = generate(
        trained.model,
        ids,
        choice,
        num_tokens=min(options.max_new_tokens, config.max_seq_len - len(ids)),
        seed=options.seed,
        samples=options.samples,
        eos_id=None if options.ignore_eos else tokenizer.eos_id,
    )
    streams = [TextStream(tokenizer, ids) for _ in range(options.samples)]
    texts = [[prompt] for _ in streams]
    live, count, started = options.samples == 1, 0, time.perf_counter()
    if live:
        _say(prompt)
    for row in tokens:
        for stream, text, token in zip(streams, texts, row, strict=True):
            if token is None:
                continue
            count += 1
            text.append(stream.add(token))
            if live:
                _say(text[-1])
    seconds = time.perf_counter() - started
    for number, (stream, text) in enumerate(zip(streams, texts, strict=True)):
        text.append(stream.rest())
        _say(f"{text[-1]}\n" if live else f"--- sample {number + 1}\n{''.join(text)}\n")
    sys.stderr.write(f"[{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.1f} tokens/s, {trained.source.name}]\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
