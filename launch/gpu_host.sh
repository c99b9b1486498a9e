#!/usr/bin/env bash
# One host with NVIDIA GPUs: one process trains on all of them.
#
#   CONFIG=configs/owt_small.py WORKDIR=runs/owt_small launch/gpu_host.sh [--config.a.b=value ...]
#   CUDA_VISIBLE_DEVICES=0,1 launch/gpu_host.sh    # on some of them
#
# Needed: the NVIDIA driver, and sedd with JAX for GPUs (make .venv/installed, or pip install -e '.[gpu]'). Ends with
# sedd's status, which is 75 after SIGTERM: all is saved, and the same command goes on. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${CONFIG:=configs/owt_small.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
: "${SEDD:=.venv/bin/sedd}"
: "${JAX_PLATFORMS:=cuda}" # or JAX would train on the processor, where no GPU works
: "${DRY_RUN:=0}"

cd "$(dirname "$0")/.."
source launch/common.sh

check_program nvidia-smi "install NVIDIA's driver, or train without a GPU with launch/local.sh"
check_program "$SEDD" "make .venv/installed, or set SEDD to the program"
run source launch/accelerator_flags.sh
run export "JAX_PLATFORMS=$JAX_PLATFORMS"
run exec "$SEDD" train "--config=$CONFIG" "--workdir=$WORKDIR" "$@"
