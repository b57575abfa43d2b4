#!/usr/bin/env bash
# Prints the state of the queued resource, and of the job on each worker.
#
#   tpu/status.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

now=$(state ACTIVE)
echo "$NAME $now"
if [[ $now == ACTIVE ]]; then on_worker all status "$JOB"; fi
