#!/usr/bin/env bash
# Trains on a TPU slice of one host or many, by queued resources of Google Cloud. docs/pods.md goes through it.
#
#   bash launch/tpu_pod.sh up --config=configs/compressibility.py      # create, install, run, follow
#   bash launch/tpu_pod.sh resume --config=configs/compressibility.py  # the same after a preemption or a stop
#   bash launch/tpu_pod.sh delete                                # gives the chips back
#
# Commands, each of which can be called alone:
#   create   asks for the slice and waits until it is there
#   install  copies this checkout (what is committed) to all hosts and installs it there
#   run      starts training on all hosts, with the arguments given here
#   follow   shows the log of host 0 until Ctrl-C, which leaves the training alone
#   stop     saves and stops on all hosts (SIGTERM)
#   resume   goes on: makes the slice anew where it was preempted, then install, run, follow
#   status   the state of the queued resource
#   delete   tears the slice down
#   up       create, install, run, follow
# --dry-run prints every command instead of running it.
#
# Variables: TPU_NAME (ddpo-jax; also the folder of the run), ZONE (us-central1-a), PROJECT (that of gcloud),
# ACCELERATOR_TYPE (v5litepod-8), RUNTIME_VERSION (v2-alpha-tpuv5-lite), SPOT (empty; 1 = preemptible), NFS (empty;
# SERVER:/SHARE, which every host mounts: what is there outlives the slice). Without NFS give
# --config.checkpoint.folder=gs://BUCKET/RUN: checkpoints and metrics then outlive the slice.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

name=${TPU_NAME:-ddpo-jax}
accelerator=${ACCELERATOR_TYPE:-v5litepod-8} runtime=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}
place=(--zone="${ZONE:-us-central1-a}")
if [ -n "${PROJECT:-}" ]; then place+=(--project="$PROJECT"); fi

queued() { run gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# on WORKERS COMMAND: runs a shell command on the hosts (0, or all).
on() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

status() { queued describe "$name" --format="value(state.state)"; }

create() {
  queued create "$name" --node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime" \
    ${SPOT:+--spot}
  active
}

# Waits until the slice is there.
active() {
  local now
  if [ -n "$dry_run" ]; then
    status
    return
  fi
  while true; do
    now=$(status || true)
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPEND*)
        say "error: $name is $now; gcloud compute tpus queued-resources describe $name says why"
        return 1
        ;;
    esac
    say "$name is ${now:-not known yet}; looking again in 30 s"
    sleep 30
  done
}

install() {
  local archive
  archive=$(mktemp)
  run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:ddpo_jax.tar.gz" "${place[@]}" --worker=all
  rm -f "$archive"
  on all "mkdir -p ddpo_jax && tar -xzf ddpo_jax.tar.gz -C ddpo_jax"
  if [ -n "${NFS:-}" ]; then on all "bash ddpo_jax/launch/tpu_host.sh mount $(words "$NFS")"; fi
  on all "bash ddpo_jax/launch/tpu_host.sh install"
}

# Every host runs the same program; JAX finds the others by the metadata of the TPU.
train() {
  local runs=/mnt/runs
  if [ -z "${NFS:-}" ]; then
    runs=runs
    say "NFS is not set: the run is kept on the hosts' own disks; when the slice is gone, what" \
      "--config.checkpoint.folder=gs://BUCKET/RUN has kept elsewhere is left"
  fi
  on all "bash ddpo_jax/launch/tpu_host.sh run $(words "--workdir=$runs/$name" "$@")"
}

# begin ARGUMENTS: on a slice that is there.
begin() {
  install
  train "$@"
  follow
}

follow() { on 0 "tail -n 40 -F ddpo_jax/run.log"; }

stop() { on all "bash ddpo_jax/launch/tpu_host.sh stop"; }

# --force takes the hosts down with the request for them.
delete() { queued delete "$name" --force --quiet; }

# A slice is given back only where Google Cloud says that it is lost: an answer that does not come says nothing.
resume() {
  local now=FAILED why # in a dry run
  if [ -z "$dry_run" ] && ! now=$(status 2>/dev/null); then
    why=$(status 2>&1 || true)
    case $why in
      *NOT_FOUND*) now="" ;;
      *)
        say "error: the state of $name is not known: $why"
        return 1
        ;;
    esac
  fi
  case $now in
    ACTIVE) ;;
    "") create ;;
    FAILED | SUSPEND*)
      say "$name is lost ($now): it is made anew"
      delete
      create
      ;;
    *) active ;;
  esac
  begin "$@"
}

up() {
  create
  begin "$@"
}

parse "$@"
case $command in
  run | resume | up)
    if [ ${#arguments[@]} -eq 0 ]; then
      refuse "$command: received no arguments; give those of the training, as --config=configs/compressibility.py"
    fi
    ;;
esac
if [ -z "$dry_run" ] && [ "$command" != help ] && ! command -v gcloud >/dev/null; then
  refuse "gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run does without"
fi
case $command in
  create | install | follow | stop | status | delete) "$command" ;;
  run) train "${arguments[@]}" ;;
  resume | up) "$command" "${arguments[@]}" ;;
  help) usage "${BASH_SOURCE[0]}" ;;
  *) refuse "command: received '$command'; it must be one of up, resume, stop, delete, ...; see --help" ;;
esac
