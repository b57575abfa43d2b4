#!/usr/bin/env bash
# Sends SIGTERM to the job on every worker: it writes a checkpoint and exits with 75. tpu/run.sh
# resumes it.
#
#   tpu/stop.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

on_worker all stop "$JOB"
