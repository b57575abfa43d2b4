#!/usr/bin/env bash
# Requests the TPU slice as a queued resource, and waits until it is active.
#
#   tpu/create.sh [--dry-run]
#
# If the queued resource exists already, it only waits. If that is SUSPENDED (preempted) or FAILED,
# it exits with 1: tpu/watch.sh replaces the slice, or delete it with tpu/delete.sh and try again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

now=$(state ABSENT)
if [[ $now == ABSENT ]]; then
  image=$(runtime_version)
  tier=()
  if [[ $SPOT == 1 ]]; then tier=(--spot); fi
  # With the default scopes a VM can only read buckets, but checkpoints are written to them.
  gc queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$image" --scopes=https://www.googleapis.com/auth/cloud-platform \
    ${tier[@]+"${tier[@]}"} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
  now=$(state ACTIVE)
fi

while true; do
  case $now in
    ACTIVE)
      say "$NAME is ACTIVE"
      exit 0
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING | ABSENT)
      say "$NAME is $now; tpu/watch.sh replaces it, or delete it with tpu/delete.sh and try again"
      exit 1
      ;;
    *)
      say "$NAME is $now; checking again in ${POLL}s"
      sleep "$POLL"
      now=$(state ACTIVE) || now=unknown
      ;;
  esac
done
