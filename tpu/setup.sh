#!/usr/bin/env bash
# Copies this working tree (the files that git tracks, with uncommitted changes) to every worker,
# installs it in a virtual environment, and mounts the shared storage.
#
#   tpu/setup.sh [--dry-run]
#
# Does nothing on a worker that has the same code installed and the storage mounted.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

if [[ -z $BUCKET && -z $NFS ]]; then
  say "warning: neither BUCKET nor NFS is set; several workers need a --workdir on shared storage"
fi
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
cp "$TPU_DIR/worker.sh" "$bundle/worker.sh"
# Without timestamps and owners, so that the same code gives the same archive.
git -C "$ROOT" ls-files -z |
  tar -C "$ROOT" --null -T - --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - | gzip -n >"$bundle/code.tar.gz"

gc tpu-vm ssh "$NAME" --worker=all "--command=mkdir -p $WORKER_DIR" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
gc tpu-vm scp "$bundle/worker.sh" "$bundle/code.tar.gz" "$NAME:$WORKER_DIR/" --worker=all ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
on_worker all setup "$BUCKET" "$NFS" "$MOUNT"
say "$NAME is set up"
