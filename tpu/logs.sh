#!/usr/bin/env bash
# Follows the job's log on the first worker, which alone prints progress, or on WORKER=N|all.
#
#   tpu/logs.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

on_worker "${WORKER:-0}" logs "$JOB"
