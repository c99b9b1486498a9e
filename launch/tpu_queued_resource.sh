#!/usr/bin/env bash
# A Cloud TPU slice as a queued resource: requests it, waits, sends the committed code to all workers and trains.
# After preemption it requests another slice and resumes. At the end it deletes the slice.
#
#   PROJECT=my-project ZONE=us-west4-a WORKDIR=gs://my-bucket/owt_small \
#     launch/tpu_queued_resource.sh [--config.a.b=value ...]
#
# Needs git, gcloud logged in to a project with the TPU API, and for slices of several workers a key in the ssh agent
# (ssh-add ~/.ssh/google_compute_engine). The slice's service account needs write access to WORKDIR. The workers have no
# text: prepare it in a bucket (sedd prepare --out=gs://BUCKET/TEXT) and add
# --config.data.source=prepared:gs://BUCKET/TEXT. The script can be stopped and restarted. DRY_RUN=1 prints commands.
set -euo pipefail

: "${PROJECT:=}"
: "${ZONE:=}"
: "${NAME:=sedd}"
: "${ACCELERATOR:=v5litepod-16}"
: "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${CAPACITY:=spot}" # or reserved, or on-demand
: "${CONFIG:=configs/owt_small.py}"
: "${WORKDIR:=}"
: "${MAX_TRIES:=100}" # number of requested slices plus started runs
: "${POLL_SECONDS:=60}"
: "${DRY_RUN:=0}"

cd "$(dirname "$0")/.."
source launch/common.sh

check_given PROJECT ZONE WORKDIR
check_bucket
check_count MAX_TRIES POLL_SECONDS
case $CAPACITY in
  spot | reserved) capacity=("--$CAPACITY") ;;
  on-demand) capacity=() ;;
  *) fail "CAPACITY=$CAPACITY must be spot, reserved or on-demand" ;;
esac
check_program gcloud "install the Google Cloud CLI"

where=("--project=$PROJECT" "--zone=$ZONE")
printf -v command ' %q' .venv/bin/sedd train "--config=$CONFIG" "--workdir=$WORKDIR" "$@"
# The command for each worker. With the lock, a new run waits for the end of one whose connection was lost. uv provides
# a recent Python.
worker_command="exec 9>>sedd.lock && flock 9"
worker_command+=" && rm -rf sedd && mkdir sedd && tar -xzf sedd.tar.gz -C sedd && cd sedd"
worker_command+=" && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python=3.12 .venv"
worker_command+=" && python3 -m uv pip install --quiet --python=.venv/bin/python -e '.[tpu,gcs]'"
worker_command+=" && source launch/accelerator_flags.sh && exec$command"

create() {
  run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "--node-id=$NAME" \
    "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${capacity[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

describe() {
  run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)"
}

# Sends the code to all workers and trains on them.
train() {
  run mkdir -p runs &&
    run git archive --format=tar.gz "--output=runs/$NAME.tar.gz" HEAD &&
    run gcloud compute tpus tpu-vm scp "runs/$NAME.tar.gz" "$NAME:sedd.tar.gz" "${where[@]}" --worker=all &&
    run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "--command=$worker_command"
}

tries=0
count_try() {
  tries=$((tries + 1))
  [[ $tries -le $MAX_TRIES ]] || fail "gave up after MAX_TRIES=$MAX_TRIES: WORKDIR=$WORKDIR holds what was saved"
}

# The state of the slice: NONE if there is none, UNKNOWN if gcloud cannot tell, as while the network is away.
state_of_slice() {
  local said
  said=$(mktemp)
  if ! describe 2>"$said"; then
    if grep -q NOT_FOUND "$said"; then echo NONE; else
      cat "$said" >&2
      echo UNKNOWN
    fi
  fi
  rm -f "$said"
}

# Waits for the slice. Requests one if there is none, or if the last one failed or was preempted.
wait_until_active() {
  local state
  while true; do
    state=$(state_of_slice)
    echo "$(date +%FT%T) $NAME: $state" >&2
    case $state in
      ACTIVE) return ;;
      NONE)
        count_try
        create
        ;;
      FAILED | SUSPENDED) delete ;;
      UNKNOWN)
        count_try
        sleep "$POLL_SECONDS"
        ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

if [[ $DRY_RUN == 1 ]]; then
  create
  describe
  train
  delete
  exit
fi
while true; do
  wait_until_active
  count_try
  status=0
  train || status=$?
  [[ $status != 0 ]] || break
  # 75: stopped and saved. 255: the connection was lost. Any other status is an error, unless the slice is disappearing.
  sleep "$POLL_SECONDS"
  if [[ $status != 75 && $status != 255 && $(describe) == ACTIVE ]]; then
    echo "tpu_queued_resource.sh: sedd ended with $status; the slice is still there, and this gives it back:" >&2
    DRY_RUN=1 delete >&2
    exit "$status"
  fi
done
delete
