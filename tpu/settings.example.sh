# shellcheck shell=bash disable=SC2034
# Copy to settings.sh and fill in. Environment variables of the same names override the file.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-b}
NAME=${NAME:-tokalign}                         # name of the queued resource and its node
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v6e-8}    # v6e-N, v5litepod-N (chips), v5p-N, v4-N (TensorCores)
RUNTIME_VERSION=${RUNTIME_VERSION:-}           # empty: the default image for this type of TPU
SPOT=${SPOT:-1}                                # 1: spot, cheaper, can be preempted; 0: on demand
BUCKET=${BUCKET:-}                             # Cloud Storage bucket to mount at MOUNT ...
NFS=${NFS:-}                                   # ... or a Filestore share, such as 10.0.0.2:/share
MOUNT=${MOUNT:-/mnt/shared}                    # put the workdir, the corpus and local models there
JOB=${JOB:-train}                              # name of the job and its log on the workers

# Additional flags, one per element.
# CREATE_FLAGS: such as --network=my-net --subnetwork=my-subnet
# --service-account=NAME@PROJECT.iam.gserviceaccount.com
CREATE_FLAGS=()
SSH_FLAGS=()      # such as --internal-ip
RUN_ENV=()        # environment variables of the job, such as HF_HOME=/mnt/shared/huggingface
