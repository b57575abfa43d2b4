#!/usr/bin/env bash
# Commands on a worker. setup.sh copies this script there, and the other scripts call it.
#
#   worker.sh setup BUCKET NFS MOUNT
#   worker.sh start JOB MOUNT COUNT [VARIABLE=VALUE ...]x COUNT ARGUMENT...
#   worker.sh status|logs|stop JOB
set -euo pipefail

home=$HOME/tokalign_jax
venv=$home/venv
say() { printf '%s: %s\n' "$(hostname)" "$*"; }

# --- setup ---

setup() {
  local bucket=$1 nfs=$2 mount=$3
  # One at a time: a second setup waits for the first, and then has nothing to do.
  exec 8>"$home/setup.lock"
  flock 8
  install_code
  if [[ -n $bucket ]]; then mount_bucket "$bucket" "$mount"; fi
  if [[ -n $nfs ]]; then mount_nfs "$nfs" "$mount"; fi
  say "ready"
}

install_code() {
  local digest
  digest=$(sha256sum <"$home/code.tar.gz")
  if [[ -f $home/installed && $(<"$home/installed") == "$digest" ]]; then
    say "this code is already installed"
    return
  fi
  for job in "$home"/jobs/*; do
    if [[ -e $job/lock ]] && running; then
      say "a job is running: the code is not replaced; repeat tpu/setup.sh when it has ended"
      return
    fi
  done
  rm -f "$home/installed"
  # The images have Python 3.10; uv installs a newer one.
  if [[ ! -x $home/uv/bin/uv ]]; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$home/uv" uv
  fi
  if [[ ! -x $venv/bin/python ]]; then "$home/uv/bin/uv" venv --quiet --python 3.12 "$venv"; fi
  rm -rf "$home/code"
  mkdir -p "$home/code"
  tar -xzf "$home/code.tar.gz" -C "$home/code"
  "$home/uv/bin/uv" pip install --quiet --python "$venv/bin/python" --editable "$home/code[tpu]"
  printf '%s' "$digest" >"$home/installed"
}

mount_bucket() {
  local bucket=$1 mount=$2
  if mountpoint -q "$mount"; then
    say "$mount is already mounted"
    return
  fi
  if ! command -v gcsfuse >/dev/null; then install_gcsfuse; fi
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  # No metadata cache, so that workers see each other's files at once. Checkpoints are finished by
  # renaming a directory, which is atomic if the bucket has a hierarchical namespace.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=100000 \
    "$bucket" "$mount"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc wait=(-o DPkg::Lock::Timeout=600)
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get "${wait[@]}" -qq update
  sudo apt-get "${wait[@]}" -qq install -y gcsfuse
}

mount_nfs() {
  local share=$1 mount=$2
  if mountpoint -q "$mount"; then
    say "$mount is already mounted"
    return
  fi
  if ! command -v mount.nfs >/dev/null; then
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y nfs-common
  fi
  sudo mkdir -p "$mount"
  sudo mount -t nfs -o rw,hard "$share" "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
}

# --- the job: a folder with `lock` (held while it runs), `command`, `pid`, `log`, `exit_code` ---

running() { ! flock --nonblock "$job/lock" true; }

start() {
  local mount=$1 count=$2
  shift 2
  mkdir -p "$job"
  touch "$job/lock"
  exec 8>"$job/start.lock"
  flock 8
  local command environment=("${@:1:count}")
  command=$(printf '%q ' "$@")
  shift "$count"
  if running; then
    if [[ $(<"$job/command") != "$command" ]]; then
      say "error: job ${job##*/} is running another command ($(<"$job/command")):" \
        "wait until it has ended, or stop it with tpu/stop.sh"
      exit 2
    fi
    say "the job is already running (process $(<"$job/pid"))"
    return
  fi
  rm -f "$job/exit_code" "$job/pid"
  printf '%s' "$command" >"$job/command"
  if mountpoint -q "$mount"; then
    # Keep compiled programs beyond the life of the VM. RUN_ENV can override the variable.
    environment=("JAX_COMPILATION_CACHE_DIR=$mount/.jax_cache" ${environment[@]+"${environment[@]}"})
  fi
  cd "$home/code"
  setsid nohup env ${environment[@]+"${environment[@]}"} bash "$home/worker.sh" supervise "${job##*/}" \
    "$venv/bin/python" -m tokalign_jax.main "$@" </dev/null >>"$job/log" 2>&1 8>&- &
  for _ in {1..50}; do # until it has the lock or has ended
    if [[ -f $job/pid || -f $job/exit_code ]]; then break; fi
    sleep 0.1
  done
  say "started"
}

# Runs a command and records its exit code, even after the connection is closed.
supervise() {
  exec 9>"$job/lock"
  flock --timeout 5 9
  "$@" &
  local child=$! code=0
  printf '%s' "$child" >"$job/pid"
  trap : TERM # a VM that shuts down sends it to all processes, so the child has it, too
  while true; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # else `wait` was interrupted by the trap
  done
  printf '%s' "$code" >"$job/exit_code.partial"
  mv "$job/exit_code.partial" "$job/exit_code"
}

status() { # prints a line that watch.sh parses
  if [[ -e $job/lock ]] && running; then
    echo "job $(hostname) running"
  elif [[ -f $job/exit_code ]]; then
    echo "job $(hostname) exited $(<"$job/exit_code")"
  elif [[ -f $job/pid ]]; then
    echo "job $(hostname) exited 137" # it and its supervisor were killed
  else
    echo "job $(hostname) none"
  fi
}

stop() {
  if [[ -e $job/lock ]] && running; then
    kill -TERM "$(<"$job/pid")" && say "stop requested"
  else
    say "no job is running"
  fi
}

logs() {
  mkdir -p "$job"
  touch "$job/log"
  tail -n 100 -F "$job/log"
}

verb=$1
shift
case $verb in
  setup) setup "$@" ;;
  start | status | stop | logs | supervise)
    job=$home/jobs/$1
    shift
    "$verb" "$@"
    ;;
  *) exit 2 ;;
esac
