#!/usr/bin/env bash
# One host with NVIDIA GPUs: one process trains on all of them.
#
#   CONFIG=configs/owt_small.py WORKDIR=runs/owt_small launch/gpu_host.sh [--config.a.b=value ...]
#   CUDA_VISIBLE_DEVICES=0,1 launch/gpu_host.sh    # on some of them
#
# Needs the NVIDIA driver, and sedd with JAX for GPUs (make .venv/installed, or pip install -e '.[gpu]'). Exits with
# sedd's status. After SIGTERM it is 75: the run is saved, and the same command resumes it. DRY_RUN=1 prints the
# commands.
set -euo pipefail

: "${CONFIG:=configs/owt_small.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
: "${SEDD:=.venv/bin/sedd}"
: "${JAX_PLATFORMS:=cuda}" # without it, JAX would train on the CPU if no GPU works
: "${DRY_RUN:=0}"

cd "$(dirname "$0")/.."
source launch/common.sh

check_program nvidia-smi "install NVIDIA's driver, or train without a GPU with launch/local.sh"
check_program "$SEDD" "make .venv/installed, or set SEDD to the program"
run source launch/accelerator_flags.sh
run export "JAX_PLATFORMS=$JAX_PLATFORMS"
run exec "$SEDD" train "--config=$CONFIG" "--workdir=$WORKDIR" "$@"
