# Sourced by the other scripts. Defines `environment EXTRAS [PACKAGE...]`: makes the virtual environment (.venv in the
# checkout, or $DDPO_VENV), installs the packages one after the other and then the project with those extras, unless
# nothing of that changed since the last time.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DDPO_VENV:-$root/.venv}
source "$root/launch/common.sh"

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local names=${PYTHON:-python3 python3.13 python3.12 python3.11 python} name
  for name in $names; do
    if command -v "$name" >/dev/null && supported "$name"; then
      echo "$name"
      return
    fi
  done
  say "Python 3.11 or newer is needed, and none of these is: $names." \
    "Install one, or point at it: PYTHON=python3.12 bash launch/local.sh ..."
  return 2
}

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

environment() {
  local extras=$1 python stamp wanted package
  shift
  if ! supported "$venv/bin/python"; then
    python=$(find_python) || return 2
    say "making a virtual environment in $venv ($("$python" --version 2>&1))"
    "$python" -m venv --clear "$venv" || {
      say "\`$python -m venv\` failed (on Debian and Ubuntu: apt install python3-venv)"
      return 1
    }
  fi
  stamp=$venv/.ddpo_jax-${extras:-core}
  wanted="$root $* $(cksum <"$root/setup.py")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  say "installing${extras:+ with extras [$extras]} into $venv: a few minutes the first time, nothing after that"
  for package in "$@"; do install "$package" || return 1; done
  install -e "$root${extras:+[$extras]}" || return 1
  echo "$wanted" >"$stamp" # written last, so that an interrupted installation is repeated
}
