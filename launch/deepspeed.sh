#!/usr/bin/env bash
# Train under DeepSpeed's launcher on NUM accelerators of this machine (1 by default), or of every machine in HOSTFILE:
#   NUM=4 bash launch/deepspeed.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
#   HOSTFILE=hosts NUM=8 bash launch/deepspeed.sh ...
# HOSTFILE has a line `name slots=8` for each machine. All of them see this folder under the same path, this one reaches them by ssh
# without a password, and pdsh is installed here. Variables for all of them go into a file .deepspeed_env, as NAME=VALUE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# deepspeed.launcher.runner is the `deepspeed` command, found without PATH. Without a hostfile it must not look for one elsewhere.
exec "${PYTHON:-.venv/bin/python}" -m deepspeed.launcher.runner --hostfile "${HOSTFILE:-none}" \
    --num_accelerators "${NUM:-1}" --module ngpt.train "$@"
