#!/usr/bin/env bash
# Installs the test extra and runs every check: ruff, mypy, pytest. Arguments go to pytest, for example
#
#   bash launch/test.sh                       # all but the slow tests
#   bash launch/test.sh -m slow               # the slow ones
#   bash launch/test.sh tests/test_find.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# torch first and on its own, at a version with a CPU wheel at hand: the newest torch as a mere requirement of another
# package brings several GB of CUDA.
environment test torch==2.13.0
# Oracles whose own requirements would replace the CPU build of torch, or are not needed for what the tests ask of them.
oracles="open_clip_torch ftfy timm trl==0.22.2 rliable"
if [ "$(cat "$venv/.ddpo_jax-oracles" 2>/dev/null)" != "$oracles" ]; then
  # shellcheck disable=SC2086  # one word each
  install --no-deps $oracles
  echo "$oracles" >"$venv/.ddpo_jax-oracles"
fi
cd "$root"
PATH=$venv/bin:$PATH
ruff check .
ruff format --check .
mypy
export HF_HUB_OFFLINE=1
# A later -m replaces this one, so `-m slow` selects the slow tests.
exec python -m pytest -n 2 -m "not slow" "$@"
