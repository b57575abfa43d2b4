# shellcheck shell=bash disable=SC2034
# Shared by the scripts of this folder: settings, flags and gcloud calls. To be sourced, not run.
set -euo pipefail

TPU_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$TPU_DIR")
WORKER_DIR=tokalign_jax # on a worker, under its home

# Settings come from the file. The environment overrides it if the file has VAR=${VAR:-...}.
SETTINGS=${SETTINGS:-$TPU_DIR/settings.sh}
CREATE_FLAGS=() SSH_FLAGS=() RUN_ENV=()
# shellcheck source=/dev/null
if [[ -f $SETTINGS ]]; then source "$SETTINGS"; fi
PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-tokalign}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v6e-8} RUNTIME_VERSION=${RUNTIME_VERSION:-} SPOT=${SPOT:-1}
BUCKET=${BUCKET:-} NFS=${NFS:-} MOUNT=${MOUNT:-/mnt/shared} JOB=${JOB:-train}
POLL=${POLL:-60} MAX_FAILURES=${MAX_FAILURES:-3} DRY_RUN=${DRY_RUN:-0}

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 2
}

# Parses --dry-run and --help; arguments after `--` go to ARGS. The help of a script is its first
# comment.
parse() {
  ARGS=()
  while (($#)); do
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      --help | -h)
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
      --)
        shift
        ARGS=("$@")
        break
        ;;
      *) die "unknown argument '$1'; put the arguments of tokalign run after --" ;;
    esac
    shift
  done
  [[ -n $PROJECT ]] || die "PROJECT is not set: see settings.example.sh, and set it in $SETTINGS"
  [[ -n $ZONE ]] || die "ZONE is not set: see settings.example.sh, and set it in $SETTINGS"
}

# Prints the image for the type of TPU (https://cloud.google.com/tpu/docs/runtimes).
runtime_version() {
  if [[ -n $RUNTIME_VERSION ]]; then
    echo "$RUNTIME_VERSION"
    return
  fi
  case $ACCELERATOR_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "no default image for ACCELERATOR_TYPE '$ACCELERATOR_TYPE': set RUNTIME_VERSION" ;;
  esac
}

# Calls gcloud in the project and zone; with --dry-run, prints the call instead.
gc() {
  local group=$1 verb=$2
  shift 2
  local call=(gcloud compute tpus "$group" "$verb" "$@" "--project=$PROJECT" "--zone=$ZONE" --quiet)
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "${call[@]}"
    echo
  else
    "${call[@]}"
  fi
}

# Prints the state of the queued resource (ACTIVE, SUSPENDED, ...), or ABSENT. With --dry-run,
# prints $1 without a call.
state() {
  if [[ $DRY_RUN == 1 ]]; then
    echo "$1"
    return
  fi
  local errors found
  errors=$(mktemp)
  if found=$(gc queued-resources describe "$NAME" --format='value(state.state)' 2>"$errors"); then
    echo "$found"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

# Runs worker.sh with these arguments on worker $1 (a number, or all). They are quoted for the
# remote shell, so that spaces, quotes and globs are preserved.
on_worker() {
  local worker=$1
  shift
  local command
  command=$(printf '%q ' bash "$WORKER_DIR/worker.sh" "$@")
  gc tpu-vm ssh "$NAME" "--worker=$worker" "--command=$command" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
}
