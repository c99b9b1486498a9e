#!/usr/bin/env bash
# TPU slices of a GKE cluster that xpk made. xpk writes a JobSet, which restarts the run when it was stopped.
#
#   PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster IMAGE=gcr.io/my-project/sedd \
#     WORKDIR=gs://my-bucket/owt_small launch/xpk.sh [--config.a.b=value ...]
#
# Needs xpk, with kubectl and gcloud logged in, and IMAGE built from launch/Dockerfile. The cluster's nodes need write
# access to WORKDIR. They have no text: prepare it in a bucket (sedd prepare --out=gs://BUCKET/TEXT) and add
# --config.data.source=prepared:gs://BUCKET/TEXT. DRY_RUN=1 prints the command.
set -euo pipefail

: "${PROJECT:=}"
: "${ZONE:=}"
: "${CLUSTER:=}"
: "${NAME:=sedd}"
: "${TPU_TYPE:=v5litepod-16}"
: "${NUM_SLICES:=1}"
: "${IMAGE:=}"
: "${CONFIG:=configs/owt_small.py}"
: "${WORKDIR:=}"
: "${MAX_RESTARTS:=100}"
: "${GRACE_SECONDS:=300}" # time to save after SIGTERM
: "${DRY_RUN:=0}"

cd "$(dirname "$0")/.."
source launch/common.sh

check_given PROJECT ZONE CLUSTER IMAGE WORKDIR
check_bucket
check_count NUM_SLICES MAX_RESTARTS GRACE_SECONDS
check_program xpk "pip install xpk"

# With exec, xpk's SIGTERM reaches sedd and not a shell around it.
printf -v command ' %q' sedd train "--config=$CONFIG" "--workdir=$WORKDIR" "$@"
run exec xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" \
  "--tpu-type=$TPU_TYPE" "--num-slices=$NUM_SLICES" "--docker-image=$IMAGE" \
  "--max-restarts=$MAX_RESTARTS" --restart-on-exit-codes=75 "--termination-grace-period-seconds=$GRACE_SECONDS" \
  "--command=source launch/accelerator_flags.sh && exec$command"
