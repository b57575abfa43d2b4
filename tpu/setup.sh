#!/usr/bin/env bash
# Brings this working tree (the files that git tracks, as they are now) to every worker, installs it with a Python of its
# own and mounts the shared storage.
#
#   tpu/setup.sh [--dry-run]
#
# A worker that has this very code installed and the storage mounted has nothing left to do.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

if [[ -z $BUCKET && -z $NFS ]]; then
  say "warning: neither BUCKET nor NFS is set: with several workers, --workdir must be on storage that all of them share"
fi
bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
cp "$TPU_DIR/worker.sh" "$bundle/worker.sh"
# Without time stamps and owners, so that the same code is the same archive.
git -C "$ROOT" ls-files -z |
  tar -C "$ROOT" --null -T - --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - | gzip -n >"$bundle/code.tar.gz"

gc tpu-vm ssh "$NAME" --worker=all "--command=mkdir -p $WORKER_DIR" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
gc tpu-vm scp "$bundle/worker.sh" "$bundle/code.tar.gz" "$NAME:$WORKER_DIR/" --worker=all ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
on_worker all setup "$BUCKET" "$NFS" "$MOUNT"
say "$NAME is set up"
