"""The command that plans: `python -m ngpt.plan --device rtx4090 experiment=c4_1b_natural_galore`, with the same settings as training.

What a run needs in memory, operations and time, by arithmetic, in seconds and before anything is allocated. Settings are composed and
checked as `ngpt.train` does; files (tokenizer, shards, checkpoints) are not looked for, as they may be on another machine.
"""

from __future__ import annotations

import argparse
import os
import sys

from ngpt.config.command_line import parser
from ngpt.config.compose import compose_run
from ngpt.config.devices import GPUS, gpu_called, gpu_of
from ngpt.config.problems import ConfigError
from ngpt.config.schema import RunConfig
from ngpt.config.suggest import nearest
from ngpt.dist.exit_codes import EXIT_USER_ERROR

EXAMPLES = """
python -m ngpt.plan experiment=c4_1b_natural_galore                       # the memory of one GPU, and what fits on which
python -m ngpt.plan --device rtx4090 experiment=c4_1b_natural_galore      # time, and what would make it fit
python -m ngpt.plan --device a100 --ranks 8 experiment=c4_1b_adamw engine.zero_stage=2
python -m ngpt.plan --memory 12 model=llama_60m data=c4 trainer.max_tokens=1000000000
python -m ngpt.plan --device h100 --mfu 0.5 model=llama_7b data=c4 trainer.max_steps=100000

exit codes: 0 planned, 2 a mistake in the settings
"""


def main(argv: list[str] | None = None) -> int:
    """Print the plan. Returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        gpu_key = options.device
        if gpu_key is not None and gpu_called(gpu_key) is None:
            raise ConfigError([_unknown_device(gpu_key)])
        config = compose_run(options.settings, world_size=options.ranks, check_files=False)
    except ConfigError as error:
        sys.stderr.write(f"\n{error}\n")
        return EXIT_USER_ERROR
    sys.stdout.write(_planned(config, options))
    return 0


def _parser() -> argparse.ArgumentParser:
    made = parser(
        "What a run costs before it starts: memory by kind, operations, time, the cards it fits on, and what would make it fit.",
        EXAMPLES,
        prog="python -m ngpt.plan",
    )
    made.add_argument("settings", nargs="*", metavar="SETTING", help="settings as for ngpt.train: group=choice, group.setting=value")
    made.add_argument("--device", help=f"GPU to plan for (default: the one that is here): {', '.join(gpu.key for gpu in GPUS)}")
    made.add_argument("--memory", type=_positive, help="GB of a GPU that is not in that list")
    made.add_argument("--ranks", type=_whole, default=1, help="processes, one for each GPU (default 1)")
    made.add_argument("--mfu", type=_share, help="share of the peak rate that is reached, as throughput/mfu of a run says (default 0.4)")
    return made


def _planned(config: RunConfig, options: argparse.Namespace) -> str:
    # Imported here, so that a mistake in an override is answered before torch is loaded.
    from ngpt.planning.page import Target, plan_page
    from ngpt.planning.throughput import ASSUMED_MFU

    gpu = gpu_called(options.device) if options.device else _detected()
    gigabytes = options.memory or (gpu.gigabytes if gpu else None)
    return plan_page(config, Target(gpu, gigabytes, options.ranks, options.mfu or ASSUMED_MFU)) + "\n"


def _detected():
    import torch

    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _unknown_device(key: str) -> str:
    guess = nearest(key.lower(), [gpu.key for gpu in GPUS])
    fix = f"did you mean --device {guess}?" if guess else "give its memory with --memory GB and its rate with trainer.peak_flops"
    return f"--device {key}: not among {', '.join(gpu.key for gpu in GPUS)}; {fix}"


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give 0.4 for 40 %")
    return number


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
