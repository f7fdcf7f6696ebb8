#!/usr/bin/env bash
# Train in one process, on one GPU (CUDA_VISIBLE_DEVICES chooses it, 0 by default), or on the CPU where there is none.
#   bash launch/one_gpu.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

exec "${PYTHON:-.venv/bin/python}" -m ngpt.train "$@"
