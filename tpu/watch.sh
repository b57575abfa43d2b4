#!/usr/bin/env bash
# Sees a run through: creates the slice, sets it up and runs; when the slice is preempted (SUSPENDED), has FAILED or is
# gone, replaces it and runs the same command again, which goes on from its newest checkpoint.
#
#   tpu/watch.sh [--dry-run] -- --config configs/optimal.py --workdir /mnt/shared/runs/optimal
#
# Ends with 0 when the run is done, 2 when its input is bad, 1 for any other failure; the slice is left as it is. May
# itself be stopped and started again at any time: it takes up what it finds.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#ARGS[@]})) || die "nothing to run; give the arguments of tokalign_jax.main after --"

flags=()
if [[ $DRY_RUN == 1 ]]; then flags=(--dry-run); fi
step() { # one of the other scripts
  local script=$1
  shift
  "$TPU_DIR/$script" ${flags[@]+"${flags[@]}"} "$@"
}
up=0 # whether this command runs, or ran: what a job's exit codes say before that is of another run
bring_up() {
  up=0
  step create.sh && step setup.sh && step run.sh -- "${ARGS[@]}" && up=1
}

# How the job is, over all workers: `running`, `absent` (not set up, not started, or not on all of them), or their exit codes.
job_state() {
  local lines
  if ! lines=$(on_worker all status "$JOB") || grep -q '^job .* none$' <<<"$lines"; then
    echo absent
  elif grep -q '^job .* running$' <<<"$lines"; then
    echo running
  else
    sed -n 's/^job .* exited \([0-9]*\)$/\1/p' <<<"$lines"
  fi
}

if [[ $DRY_RUN == 1 ]]; then
  bring_up
  exit 0
fi

failures=0 kills=0 ran=0
bring_up || say "$NAME is not up; looking why"
while true; do
  now=$(state ACTIVE) || now=UNKNOWN # gcloud could not be reached: ask again later
  case $now in
    SUSPENDED | SUSPENDING | FAILED)
      say "$NAME is $now: replacing it"
      if [[ $now == FAILED ]]; then failures=$((failures + 1)); fi
      if ((failures >= MAX_FAILURES)); then
        say "error: the request for $NAME failed $failures times in a row; see: gcloud compute tpus queued-resources describe $NAME"
        exit 1
      fi
      step delete.sh || say "$NAME is not deleted yet"
      ;;
    ABSENT | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
      bring_up || say "$NAME is not up; trying again in ${POLL}s"
      ;;
    ACTIVE)
      codes=absent
      if ((up)); then codes=$(job_state); fi
      if [[ $codes == running ]]; then
        failures=0 ran=$((ran + 1))
      elif [[ $codes == absent ]]; then
        bring_up || say "$NAME is not up; trying again in ${POLL}s"
      elif ! grep -qv '^0$' <<<"$codes"; then
        say "the run is done"
        exit 0
      elif grep -q '^2$' <<<"$codes"; then
        say "error: the run has bad input (exit code 2); tpu/logs.sh shows which"
        exit 2
      elif grep -q '^75$' <<<"$codes"; then
        say "the run was stopped with a checkpoint: going on"
        bring_up || say "$NAME is not up; trying again in ${POLL}s"
      else
        # A preempted slice may kill the workers before it says that it is suspended.
        sleep "$POLL"
        if [[ $(state ACTIVE) == ACTIVE ]]; then
          if ((ran > MAX_FAILURES)); then kills=0; fi
          if ((kills >= MAX_FAILURES)) || ! grep -qE '^(12[89]|1[3-9].|2..)$' <<<"$codes"; then
            say "error: the run failed (exit codes: $(tr '\n' ' ' <<<"$codes")); tpu/logs.sh shows why"
            exit 1
          fi
          # A worker was killed or started anew under it.
          say "a process of the run was killed (exit codes: $(tr '\n' ' ' <<<"$codes")): going on"
          kills=$((kills + 1)) ran=0
          bring_up || say "$NAME is not up; trying again in ${POLL}s"
        fi
      fi
      ;;
  esac
  sleep "$POLL"
done
