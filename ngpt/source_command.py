"""What the commands that take a trained model have in common: SOURCE, --device and --dtype, and mistakes answered in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ngpt.checkpoint.tensor_file import CheckpointError
from ngpt.config.command_line import CommandParser
from ngpt.config.problems import ConfigError
from ngpt.config.redaction import redact
from ngpt.data.documents import DataError
from ngpt.dist.exit_codes import EXIT_USER_ERROR
from ngpt.trained import Trained, open_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SOURCE_HELP = "run folder (its newest checkpoint), step folder, or LLaMA folder in Hugging Face's layout"


class Parser(CommandParser):
    """The parser of such a command, which shows examples below the options."""

    def __init__(self, prog: str, *, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_source(self) -> None:
        """SOURCE, --device and --dtype."""
        self.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE_HELP)
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): an NVIDIA GPU if there is one")
        self.add_argument("--dtype", choices=tuple(DTYPES), help="of weights and activations (default: as they lie on disk)")


def open_source(options: argparse.Namespace) -> Trained:
    """The model that SOURCE, --device and --dtype ask for. Raises CheckpointError."""
    return open_trained(options.source, device=device_of(options), dtype=dtype_of(options))


def device_of(options: argparse.Namespace) -> torch.device:
    """What --device means here. Raises CheckpointError where there is no such device."""
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise CheckpointError("--device cuda: torch sees no NVIDIA GPU here; use --device auto, or install a CUDA build of torch")
    return torch.device("cuda" if available and options.device != "cpu" else "cpu")


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """What --dtype means; None for the dtype on disk."""
    return None if options.dtype is None else DTYPES[options.dtype]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse; underscores may part thousands."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def exit_code_of(command: Callable[[], int]) -> int:
    """What `command` returns; after a mistake of the user its text goes to the terminal, and the code is 2."""
    try:
        return command()
    except (CheckpointError, DataError, ConfigError) as error:
        sys.stderr.write(f"{redact(str(error))}\n")
        return EXIT_USER_ERROR
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 0
