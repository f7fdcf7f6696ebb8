"""A grid of runs on several processes: one launch per job, in turn. (On one process, `-m` of ngpt.train does the same.)

NPROC=2 python launch/sweep.py launch/torchrun.sh optimizer.lr=0.005,0.01 seed=0,1 experiment=quickstart

The first argument is a launch script; a setting with several values, separated by commas outside of brackets and quotes, varies. Each
job has a run folder of its own, named by what varies, so that the same command continues a sweep that was stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ngpt.config.compose import compose_run, jobs_of_sweep, sweep_name


def main() -> int:
    """Run the jobs; stops at a signal, and returns the highest exit code of the jobs."""
    script, arguments = sys.argv[1], sys.argv[2:]
    codes = [0]
    for job in jobs_of_sweep(arguments):
        name = sweep_name(compose_run(job, check_files=False).run.name, job, arguments)
        job = [argument for argument in job if not argument.startswith("run.name=")] + [f"run.name={name}"]
        sys.stdout.write(f"job {name}\n")
        sys.stdout.flush()
        codes.append(subprocess.run(["bash", script, *job], check=False).returncode)
        if codes[-1] in (75, 130) or codes[-1] < 0:
            break
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main())
