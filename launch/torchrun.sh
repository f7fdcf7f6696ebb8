#!/usr/bin/env bash
# Train under torchrun on this machine, on NPROC GPUs or, without any, in NPROC processes (by default: all there are).
#   NPROC=4 bash launch/torchrun.sh experiment=c4_60m_natural_galore tokenizer.path=spiece.model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torch.distributed.run is torchrun, found without PATH.
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc-per-node "${NPROC:-auto}" -m ngpt.train "$@"
