#!/usr/bin/env bash
# Train on several machines: start this on each of them, with the same settings and HEAD, the name of one of them, NNODES machines
# with NPROC GPUs each. All of them see the run folder under the same path. A machine that joins late is waited for.
#   HEAD=gpu1 NNODES=2 NPROC=8 bash launch/multi_node.sh experiment=c4_1b_natural_galore tokenizer.path=spiece.model
# Where a process dies, all start again up to RESTARTS times and continue from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes "${NNODES:?number of machines}" --nproc-per-node "${NPROC:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name of one machine}:${PORT:-29400}" --rdzv-id "${RUN_ID:-ngpt}" \
    --max-restarts "${RESTARTS:-0}" -m ngpt.train "$@"
