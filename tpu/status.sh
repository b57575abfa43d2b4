#!/usr/bin/env bash
# Says how the queued resource and the job on each worker are.
#
#   tpu/status.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

now=$(state ACTIVE)
echo "$NAME $now"
if [[ $now == ACTIVE ]]; then on_worker all status "$JOB"; fi
