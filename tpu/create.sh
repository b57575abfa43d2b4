#!/usr/bin/env bash
# Asks for the TPU slice as a queued resource, and waits until it is there.
#
#   tpu/create.sh [--dry-run]
#
# Nothing is asked for twice: where the queued resource exists, this only waits. One that is SUSPENDED (preempted) or
# FAILED is reported: tpu/watch.sh replaces those, or tpu/delete.sh and this.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

now=$(state ABSENT)
if [[ $now == ABSENT ]]; then
  image=$(runtime_version)
  tier=()
  if [[ $SPOT == 1 ]]; then tier=(--spot); fi
  # The default scopes of a VM can only read buckets; checkpoints have to be written.
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
      say "$NAME is $now"
      exit 1
      ;;
    *)
      say "$NAME is $now; asking again in ${POLL}s"
      sleep "$POLL"
      now=$(state ACTIVE) || now="out of reach"
      ;;
  esac
done
