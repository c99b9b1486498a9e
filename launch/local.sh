#!/usr/bin/env bash
# Quick start: trains on this machine with the devices that JAX finds. Installs sedd first if it is missing.
#
#   launch/local.sh [--config.a.b=value ...]
#   CONFIG=configs/text8.py WORKDIR=runs/text8 launch/local.sh
#
# Needs Python 3.11 or later, and make. Exits with sedd's status. After SIGTERM it is 75: the run is saved, and the same
# command resumes it. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${CONFIG:=configs/quickstart.py}"
: "${WORKDIR:=runs/$(basename "$CONFIG" .py)}"
: "${SEDD:=.venv/bin/sedd}"
: "${DRY_RUN:=0}"

cd "$(dirname "$0")/.."
source launch/common.sh

if [[ $SEDD == .venv/bin/sedd && ! -x $SEDD ]]; then
  run make .venv/installed
fi
check_program "$SEDD" "set SEDD to the program, or leave it unset"
run source launch/accelerator_flags.sh
run exec "$SEDD" train "--config=$CONFIG" "--workdir=$WORKDIR" "$@"
