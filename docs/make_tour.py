"""Writes docs/tour.md: a new user's path, run in a fresh clone, with the time of every step and what it printed.

    python docs/make_tour.py --text 'mytext/*.json.gz' --scratch /tmp/tour

`--text` are files in C4's layout, which stand for a user's own; they are copied. Every step must succeed, or nothing is written. Needs git, make and a package registry.
"""

from __future__ import annotations

import argparse
import glob
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LONGEST_LINE = 170


@dataclass(frozen=True)
class Step:
    """One command of the tour.

    Args:
        says: the sentences before it.
        command: for bash, in the clone, with the environment's programs first.
        first, last: lines of its output that are shown.
        interrupt_after: send Ctrl-C to it once this text has been printed.
        kill_after: end it, and all that it started, as a failing machine would (SIGKILL), once this text has been printed.
        show: only lines that match this.
    """

    says: str
    command: str
    first: int = 6
    last: int = 6
    interrupt_after: str = ""
    kill_after: str = ""
    show: str = ""


OWN = (
    "python -m ngpt.train model=llama_9m model.vocab_size=4096 data=local_c4 data.train_files='[mytext/*.json.gz]' \\\n"
    "    tokenizer.path=mytext/tokenizer.model trainer.seq_len=128 trainer.global_batch_size=16 trainer.micro_batch_size=16 \\\n"
    "    trainer.max_steps=120 trainer.precision=fp32 optimizer.rank=32 optimizer.lr=0.01 \\\n"
    "    checkpoint.every_steps=20 eval.every_steps=60 eval.max_tokens=20000 run.name=mytext"
)

STEPS = [
    Step("Install and train. Nothing is there before but Python and make.", "make train", first=8, last=22),
    Step("The commands that follow are for this environment: `source .venv/bin/activate`. Does the 1.1B model fit on a card of 24 GB?",
         "python -m ngpt.plan experiment=c4_1b_natural_galore tokenizer.path=spiece.model", first=60, last=8),
    Step("Text of one's own, in C4's layout, with a tokenizer of its own.",
         "python -m data_prep.train_tokenizer --files 'mytext/*.json.gz' --vocab-size 4096 --out mytext/tokenizer.model"),
    Step("Train on it. In the middle the machine fails: every process is killed at once (SIGKILL).", OWN, first=6, last=3, kill_after="step  60/120"),
    Step("What is there now?", "python -m ngpt.checkpoint list runs/mytext"),
    Step("The same command goes on from the last checkpoint. This time Ctrl-C, once: it saves first.", OWN, first=5, last=5, interrupt_after="step  80/120"),
    Step("And to the end.", OWN, first=5, last=8),
    Step("Watch it: one HTML file, and a table.", "python -m ngpt.report runs/mytext --to runs/mytext/report"),
    Step("Two optimizers: the same data, order and budget, three seeds. (Rates as they come, tuned for neither; times are those of a busy machine.)",
         "python -m ngpt.compare experiment=quickstart trainer.max_steps=100 eval.every_steps=0 checkpoint.every_steps=0 --seeds 0,1,2 \\\n"
         "    --to runs/galore-or-ours --arm galore optimizer=galore --arm ours optimizer=natural_galore", first=8, last=16),
    Step("Take the model elsewhere.", "python -m ngpt.export runs/quickstart --to runs/quickstart/hf"),
    Step("transformers loads it, without network (`bash .ci/install.sh .venv dev` installs it).",
         "HF_HUB_OFFLINE=1 python -c \"from transformers import AutoModelForCausalLM, AutoTokenizer; folder = 'runs/quickstart/hf'; \\\n"
         "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder); \\\n"
         "print(type(model).__name__, sum(p.numel() for p in model.parameters())); \\\n"
         "print(tokenizer.decode(model.generate(**tokenizer('The module provides', return_tensors='pt'), max_new_tokens=20)[0]))\""),
    Step("And so does ngpt itself.", 'python -m ngpt.generate runs/quickstart --prompt "The module provides" --max-new-tokens 40 --temperature 0.7 --seed 1'),
    Step("Its held-out loss once more, from the checkpoint.", "python -m ngpt.evaluate runs/quickstart"),
]  # fmt: skip
QUIETLY_BEFORE = {10: "bash .ci/install.sh .venv dev"}  # after how many steps: what is installed beside, and told in words


def run(step: Step, clone: Path) -> tuple[list[str], float]:
    """The lines that a step printed and its seconds. Raises RuntimeError where it ended otherwise than it should."""
    environment = {
        **os.environ,
        "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
        "NO_COLOR": "1",
    }
    environment.pop("PYTHONPATH", None)
    started = time.perf_counter()
    process = subprocess.Popen(
        ["bash", "-c", step.command],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    waits_for = step.kill_after or step.interrupt_after
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.rstrip("\n").split("\r")[-1]))
        if waits_for and waits_for in line:
            waits_for = ""
            os.killpg(process.pid, signal.SIGKILL if step.kill_after else signal.SIGINT)
    code, seconds = process.wait(), time.perf_counter() - started
    expected = {0} if not (step.kill_after or step.interrupt_after) else {-9} if step.kill_after else {130, -2}
    if code not in expected or waits_for:
        raise RuntimeError(
            f"{step.command}\nended with {code}, not {expected}" + (f"; it never printed {waits_for!r}" if waits_for else "")
        )
    return lines, seconds


def shown(step: Step, lines: list[str], clone: Path) -> str:
    """The first and the last lines of an output, without this machine's paths."""
    kept = [re.sub(f"{re.escape(str(clone))}/?", "", line).rstrip() for line in lines if re.search(step.show, line)]
    if len(kept) > step.first + step.last + 1:
        kept = [*kept[: step.first], "...", *kept[-step.last :]]
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in kept)


def machine() -> str:
    """What it ran on."""
    model = "?"
    if Path("/proc/cpuinfo").exists():
        model = next((line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}, {gib:.0f} GiB, no GPU used, Python {platform.python_version()}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="glob of files in C4's layout")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist yet, for the clone")
    options = parser.parse_args()
    clone = options.scratch / "ngpt"
    options.scratch.mkdir(parents=True)
    started = time.perf_counter()
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=clone, check=True, capture_output=True, text=True).stdout.strip()
    (clone / "mytext").mkdir()
    files = glob.glob(options.text)
    for file in files:
        shutil.copy(file, clone / "mytext")
    megabytes = sum(os.path.getsize(file) for file in files) / 1e6
    pages = []
    for number, step in enumerate(STEPS):
        if number in QUIETLY_BEFORE:
            run(Step("", QUIETLY_BEFORE[number]), clone)
        lines, seconds = run(step, clone)
        minutes = f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
        pages.append(f"## {number + 1}. {step.says}\n\n```\n$ {step.command}\n{shown(step, lines, clone)}\n```\n\n{minutes}.\n")
    whole = time.perf_counter() - started
    head = (
        "# A tour, as it ran\n\n"
        f"`python docs/make_tour.py` wrote this page: every command was given in a fresh clone of commit {commit} and printed what is shown (`...` stands for lines left out).\n"
        f"Machine: {machine()}, with other work beside it. {len(files)} files, {megabytes:.0f} MB compressed, of English in C4's layout stand for a user's own text.\n"
        f"The whole of it, installation included, took {whole / 60:.0f} minutes.\n\n"
    )
    (REPOSITORY / "docs" / "tour.md").write_text(head + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
