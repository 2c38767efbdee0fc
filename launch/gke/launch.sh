#!/usr/bin/env bash
# Trains on Kubernetes with JobSet (https://jobset.sigs.k8s.io, installed in the cluster). docs/pods.md goes through it.
#
#   IMAGE=REGISTRY/ddpo_jax:tpu bash launch/gke/launch.sh image tpu                                # builds and pushes it
#   IMAGE=REGISTRY/ddpo_jax:tpu bash launch/gke/launch.sh up tpu --config=configs/compressibility.py \
#     --config.sample.batch_size=16                                       # or gpu
#   bash launch/gke/launch.sh follow                                      # the log of host 0
#   bash launch/gke/launch.sh delete                                      # the disk of the runs stays
#
# `up` again after `delete` goes on where the run stopped; a preempted pod needs nothing. --dry-run prints every command
# (and, for up, the manifest) instead. Variables: IMAGE, NAME (ddpo-jax; also the folder of the run).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"

name=${NAME:-ddpo-jax}
pods=jobset.sigs.k8s.io/jobset-name=$name

# A word as a string of YAML, for the replacement of sed's s|||.
quoted() { printf '%s' "$1" | sed -e 's/[\\"]/\\&/g' -e 's/[\\&|]/\\&/g' -e 's/.*/"&"/'; }

manifest() {
  local kind=$1 words="" word
  shift
  for word in "$@"; do words+=", $(quoted "$word")"; done
  sed -e "s|, \"ARGUMENTS\"|$words|" -e "s|IMAGE\$|$IMAGE|" \
    -e "s|^  name: ddpo-jax\$|  name: $name|" -e "s|/runs/ddpo-jax|/runs/$name|" "$here/$kind.yaml"
}

parse "$@"
kind=${arguments[0]:-}
case $command in image | up)
  case $kind in tpu | gpu) ;; *) refuse "$command: received '$kind'; it must be followed by tpu or gpu" ;; esac
  if [ -z "${IMAGE:-}" ]; then refuse "IMAGE is not set; give the image to use, such as IMAGE=REGISTRY/ddpo_jax:$kind"; fi
  ;;
esac
case $command in
  image)
    extras=tpu
    if [ "$kind" = gpu ]; then extras=cuda; fi
    run docker build -f "$here/../Dockerfile" --build-arg "EXTRAS=$extras" -t "$IMAGE" "$here/../.."
    run docker push "$IMAGE"
    ;;
  up)
    if [ ${#arguments[@]} -eq 1 ]; then refuse "up: received no arguments; give those of the training, as --config=..."; fi
    run kubectl apply -f "$here/runs.yaml"
    if [ -n "$dry_run" ]; then
      echo "kubectl apply -f - <<'END'"
      manifest "${arguments[@]}"
      echo END
    else
      manifest "${arguments[@]}" | kubectl apply -f -
    fi
    ;;
  follow) run kubectl logs --follow --selector "$pods,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get pods --selector "$pods" ;;
  delete) run kubectl delete jobset "$name" ;;
  help) usage "${BASH_SOURCE[0]}" ;;
  *) refuse "command: received '$command'; it must be one of image, up, follow, status, delete" ;;
esac
