#!/usr/bin/env bash
# Train in the container image on one GPU of this machine. Build it once: see the first line of Dockerfile.
# Runs are written to ./runs as the calling user; DATA=folder is readable in the container as /data.
#   DATA=$HOME/c4 bash launch/docker.sh data=local_c4 data.train_files='[/data/c4-train.*.json.gz]' \
#       data.val_files='[/data/c4-validation.*.json.gz]' tokenizer.path=/data/spiece.model model=llama_60m
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p runs

# WANDB_API_KEY is handed on by name, so its value is in no command line. Five minutes to save a checkpoint after `docker stop`.
exec docker run --rm --init --gpus "${GPUS:-1}" --ipc host --stop-timeout 300 \
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env WANDB_API_KEY \
    --volume "$PWD/runs:/ngpt/runs" ${DATA:+--volume "$DATA:/data:ro"} \
    "${IMAGE:-ngpt}" python -m ngpt.train "$@"
