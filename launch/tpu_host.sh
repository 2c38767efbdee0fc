#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a slice, in the copy of the checkout that it put there.
#
#   bash launch/tpu_host.sh install              # Python where the image has none that is new enough, the project
#   bash launch/tpu_host.sh mount SERVER:/SHARE  # at /mnt/runs
#   bash launch/tpu_host.sh run ARGUMENTS        # trains in the background, log in run.log
#   bash launch/tpu_host.sh stop                 # saves and stops
#
# --dry-run prints every command instead of running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# Whether the process that was started here lives; one that nobody has waited for (Z) does not.
running() { [ -e run.pid ] && grep -q '^State:.[^ZX]' "/proc/$(cat run.pid)/status" 2>/dev/null; }

parse "$@"
export DDPO_EXTRAS=${DDPO_EXTRAS-tpu,gcs}
case $command in
  install)
    if [ -n "$dry_run" ] || ! find_python >/dev/null 2>&1; then
      run sudo add-apt-repository -y ppa:deadsnakes/ppa
      run sudo apt-get install -y python3.12 python3.12-venv
    fi
    run bash -c "bash launch/local.sh --help >/dev/null"
    ;;
  mount)
    if [ -z "$dry_run" ] && mountpoint -q /mnt/runs; then exit 0; fi
    run sudo apt-get install -y nfs-common
    run sudo mkdir -p /mnt/runs
    run sudo mount -t nfs -o hard,actimeo=1 "${arguments[0]}" /mnt/runs
    run sudo chmod a+rwx /mnt/runs
    ;;
  run)
    if [ -n "$dry_run" ]; then
      run bash launch/local.sh "${arguments[@]}"
    elif running; then
      say "process $(cat run.pid) trains here already"
    else
      nohup bash launch/local.sh "${arguments[@]}" >>run.log 2>&1 </dev/null &
      echo $! >run.pid
      say "process $! trains; its log is run.log"
    fi
    ;;
  stop)
    if [ -n "$dry_run" ]; then
      echo "kill -TERM \$(cat run.pid)"
    elif running; then
      kill -TERM "$(cat run.pid)"
      say "process $(cat run.pid) saves after its epoch and stops"
    fi
    ;;
  help) usage "${BASH_SOURCE[0]}" ;;
  *) refuse "command: received '$command'; it must be one of install, mount, run, stop; see --help" ;;
esac
