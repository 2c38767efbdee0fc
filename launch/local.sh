#!/usr/bin/env bash
# Trains on this machine: makes a virtual environment, installs the project, runs `python -m ddpo_jax.main` with the
# arguments given here.
#
#   bash launch/local.sh --config=configs/aesthetic.py
#   DDPO_EXTRAS=cuda bash launch/local.sh --config=configs/aesthetic.py      # NVIDIA GPU (tpu: TPU VM)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extras=${DDPO_EXTRAS:-}
if [ -z "$extras" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  say "this machine has an NVIDIA GPU; to use it: DDPO_EXTRAS=cuda bash launch/local.sh ..."
fi
environment "$extras"
exec "$venv/bin/python" -m ddpo_jax.main "$@"
