#!/usr/bin/env bash
# Train under torchrun on this machine. NPROC is the number of processes; this version of the trainer runs in one.
#   bash launch/torchrun.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# torch.distributed.run is torchrun, found without PATH.
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc-per-node "${NPROC:-1}" -m ngpt.train "$@"
