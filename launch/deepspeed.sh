#!/usr/bin/env bash
# Train under DeepSpeed's launcher on this machine, on one accelerator.
#   bash launch/deepspeed.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# deepspeed.launcher.runner is the `deepspeed` command, found without PATH.
exec "${PYTHON:-.venv/bin/python}" -m deepspeed.launcher.runner --num_gpus 1 --module ngpt.train "$@"
