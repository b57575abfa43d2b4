#!/usr/bin/env bash
# Starts the run on every worker, detached: it goes on when this terminal or the connection is gone.
#
#   tpu/run.sh [--dry-run] -- --config configs/optimal.py --workdir /mnt/shared/runs/optimal
#
# What follows -- are the arguments of `python -m tokalign_jax.main`. Called again while the job runs, it starts nothing;
# called again after it ended, it goes on from the newest checkpoint.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#ARGS[@]})) || die "nothing to run; give the arguments of tokalign_jax.main after --"

on_worker all start "$JOB" "$MOUNT" "${#RUN_ENV[@]}" ${RUN_ENV[@]+"${RUN_ENV[@]}"} "${ARGS[@]}"
