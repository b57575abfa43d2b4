#!/usr/bin/env bash
# Starts the run on every worker, detached: it continues without this terminal or the connection.
#
#   tpu/run.sh [--dry-run] -- --config configs/optimal.py --workdir /mnt/shared/runs/optimal
#
# The arguments after -- are those of `tokalign run`. While the job is running, repeating the
# command does nothing; after it has ended, it resumes from the newest checkpoint.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#ARGS[@]})) || die "nothing to run: put the arguments of tokalign run after --"

on_worker all start "$JOB" "$MOUNT" "${#RUN_ENV[@]}" ${RUN_ENV[@]+"${RUN_ENV[@]}"} "${ARGS[@]}"
