#!/usr/bin/env bash
# Follows the job's log on one worker (the first, which alone prints progress), or on the worker named by WORKER=N|all.
#
#   tpu/logs.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

on_worker "${WORKER:-0}" logs "$JOB"
