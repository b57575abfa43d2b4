#!/usr/bin/env bash
# Creates the slice, sets it up and runs a command until it has finished. If the slice is preempted
# (SUSPENDED), FAILED or deleted, it is replaced, and the command resumes from its newest
# checkpoint.
#
#   tpu/watch.sh [--dry-run] -- --config configs/optimal.py --workdir /mnt/shared/runs/optimal
#
# Exits with 0 if the run has finished, 2 if its input is bad, and 1 after any other failure; the
# slice is not deleted. It can be stopped and restarted at any time.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
((${#ARGS[@]})) || die "nothing to run: put the arguments of tokalign run after --"

flags=()
if [[ $DRY_RUN == 1 ]]; then flags=(--dry-run); fi
step() { # calls one of the other scripts
  local script=$1
  shift
  "$TPU_DIR/$script" ${flags[@]+"${flags[@]}"} "$@"
}
up=0 # whether this command was started: until then, exit codes are those of an earlier run
bring_up() {
  up=0
  step create.sh && step setup.sh && step run.sh -- "${ARGS[@]}" && up=1
}

# Prints the state of the job over all workers: `running`, `absent` (not set up or not started on
# some worker), or their exit codes.
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
bring_up || say "$NAME is not ready; checking its state"
while true; do
  now=$(state ACTIVE) || now=UNKNOWN # gcloud failed: try again later
  case $now in
    SUSPENDED | SUSPENDING | FAILED)
      say "$NAME is $now: replacing it"
      if [[ $now == FAILED ]]; then failures=$((failures + 1)); fi
      if ((failures >= MAX_FAILURES)); then
        say "error: the request for $NAME failed $failures times in a row; for the reason see:" \
          "gcloud compute tpus queued-resources describe $NAME --zone=$ZONE --project=$PROJECT"
        exit 1
      fi
      step delete.sh || say "$NAME is not deleted yet; trying again in ${POLL}s"
      ;;
    ABSENT | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
      bring_up || say "$NAME is not ready; trying again in ${POLL}s"
      ;;
    ACTIVE)
      codes=absent
      if ((up)); then codes=$(job_state); fi
      if [[ $codes == running ]]; then
        failures=0 ran=$((ran + 1))
      elif [[ $codes == absent ]]; then
        bring_up || say "$NAME is not ready; trying again in ${POLL}s"
      elif ! grep -qv '^0$' <<<"$codes"; then
        say "the run has finished"
        exit 0
      elif grep -q '^2$' <<<"$codes"; then
        say "error: bad input (exit code 2); tpu/logs.sh shows the message"
        exit 2
      elif grep -q '^75$' <<<"$codes"; then
        say "the run was stopped with a checkpoint: resuming"
        bring_up || say "$NAME is not ready; trying again in ${POLL}s"
      else
        # Workers of a preempted slice may be killed before its state is SUSPENDED.
        sleep "$POLL"
        if [[ $(state ACTIVE) == ACTIVE ]]; then
          if ((ran > MAX_FAILURES)); then kills=0; fi
          if ((kills >= MAX_FAILURES)) || ! grep -qE '^(12[89]|1[3-9].|2..)$' <<<"$codes"; then
            say "error: the run failed (exit codes: $(tr '\n' ' ' <<<"$codes")); see tpu/logs.sh"
            exit 1
          fi
          # A worker was killed or restarted.
          say "a process of the run was killed (exit codes: $(tr '\n' ' ' <<<"$codes")): resuming"
          kills=$((kills + 1)) ran=0
          bring_up || say "$NAME is not ready; trying again in ${POLL}s"
        fi
      fi
      ;;
  esac
  sleep "$POLL"
done
