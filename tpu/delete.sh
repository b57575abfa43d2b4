#!/usr/bin/env bash
# Deletes the queued resource and its VMs, but not the shared storage. Succeeds if there is none.
#
#   tpu/delete.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

if [[ $(state SOME) == ABSENT ]]; then
  say "$NAME does not exist"
  exit 0
fi
gc queued-resources delete "$NAME" --force
