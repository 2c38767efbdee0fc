# Sourced by the other scripts: messages, and commands that --dry-run prints instead of running.
# shellcheck shell=bash

dry_run=""

say() { printf 'ddpo_jax: %s\n' "$*" >&2; }

refuse() {
  say "error: $*"
  exit 2
}

# The word in single quotes, for any shell (bash on macOS is 3.2, which has no ${word@Q}).
single_quoted() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }

# words WORD...: a command line that a shell reads back as these words.
words() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" $(single_quoted "$word")"; fi
  done
  printf '%s\n' "${line# }"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() { if [ -n "$dry_run" ]; then words "$@"; else "$@"; fi; }

# parse WORD...: sets dry_run, command (the first word that is no flag; help if there is none) and arguments (the rest).
parse() {
  local word
  command="" arguments=()
  for word in "$@"; do
    case $word in
      --dry-run) dry_run=1 ;;
      -h | --help) command=help ;;
      *) if [ -z "$command" ]; then command=$word; else arguments+=("$word"); fi ;;
    esac
  done
  command=${command:-help}
}

# usage FILE: what stands at the top of a script.
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$1"; }
