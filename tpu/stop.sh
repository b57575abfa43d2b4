#!/usr/bin/env bash
# Asks the job on every worker to stop (SIGTERM): it writes a checkpoint and exits with 75. tpu/run.sh goes on from there.
#
#   tpu/stop.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

on_worker all stop "$JOB"
