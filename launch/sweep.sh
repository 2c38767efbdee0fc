#!/usr/bin/env bash
# Runs a sweep on this machine: makes a virtual environment, installs the project, runs `ddpo_jax sweep` with
# the arguments given here. The same command goes on where it stopped.
#
#   bash launch/sweep.sh configs/sweeps/weighting_and_replay.py
#   bash launch/sweep.sh configs/sweeps/iskl.py --seeds=0 --config.num_epochs=4      # a short trial
#   DDPO_EXTRAS=cuda bash launch/sweep.sh configs/sweeps/weighting_schemes.py        # NVIDIA GPU (tpu: TPU VM)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment "${DDPO_EXTRAS:-}"
exec "$venv/bin/python" -m ddpo_jax sweep "$@"
