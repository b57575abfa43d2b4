#!/usr/bin/env bash
# Deletes the queued resource and its VMs. What is on the shared storage stays. Where there is none, all is well.
#
#   tpu/delete.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

if [[ $(state SOME) == ABSENT ]]; then
  say "$NAME does not exist"
  exit 0
fi
gc queued-resources delete "$NAME" --force
