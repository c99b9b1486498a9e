#!/usr/bin/env bash
# Quick start: trains on this machine, on whatever devices JAX finds, and installs sedd first where it is missing.
#
#   launch/local.sh [--config.a.b=value ...]
#   CONFIG=configs/text8.py WORKDIR=runs/text8 launch/local.sh
#
# Needed: Python 3.11 or later, make. Ends with sedd's status, which is 75 after SIGTERM: all is saved, and the same
# command goes on. DRY_RUN=1 prints the commands.
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
