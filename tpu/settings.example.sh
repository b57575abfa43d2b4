# shellcheck shell=bash disable=SC2034
# Copy to settings.sh and fill in. Any of these may also come from the environment: it wins over the file.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-b}
NAME=${NAME:-tokalign}                         # of the queued resource and of its node
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v6e-8}    # v6e-N (chips), v5litepod-N (chips), v5p-N, v4-N (TensorCores)
RUNTIME_VERSION=${RUNTIME_VERSION:-}           # empty: the image for that kind of TPU
SPOT=${SPOT:-1}                                # 1: spot, cheaper and may be preempted; 0: on demand
BUCKET=${BUCKET:-}                             # Cloud Storage bucket that every worker mounts at MOUNT ...
NFS=${NFS:-}                                   # ... or a Filestore share, such as 10.0.0.2:/share
MOUNT=${MOUNT:-/mnt/shared}                    # the workdir, the corpus and local models belong under it
JOB=${JOB:-train}                              # names the job's log on the workers

# Further flags, one element each.
CREATE_FLAGS=()   # such as --network=my-net --subnetwork=my-subnet --service-account=NAME@PROJECT.iam.gserviceaccount.com
SSH_FLAGS=()      # such as --internal-ip
RUN_ENV=()        # variables for the job, such as HF_HOME=/mnt/shared/huggingface
