#!/usr/bin/env bash
# Functions that the launchers share. They source this file from the root of the checkout, after they set their knobs.

# Ends the script with one line that names the value and the remedy.
fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Runs a command. With DRY_RUN=1 prints it instead, quoted so that it can be pasted.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    [[ $1 != exec ]] || shift
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    "$@"
  fi
}

[[ $DRY_RUN == [01] ]] || fail "DRY_RUN=$DRY_RUN must be 0 or 1"
[[ -f $CONFIG ]] || fail "CONFIG=$CONFIG is not a file: give one of configs/*.py"
run cd "$PWD" || exit

# Checks that a program is installed, except in a dry run. Arguments: the program, how to get it.
check_program() {
  [[ $DRY_RUN == 1 ]] || [[ -x $(command -v "$1") ]] || fail "$1 is not installed: $2"
}

# Checks that knobs are set. Arguments: their names.
check_given() {
  local name
  for name; do
    [[ -n ${!name} ]] || fail "$name must be set: see the head of this script"
  done
}

# Checks that knobs are whole numbers of at least 1. Arguments: their names.
check_count() {
  local name
  for name; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} must be a whole number from 1"
  done
}

# Checks that WORKDIR is in a bucket, because the hosts share no disk.
check_bucket() {
  [[ $WORKDIR == gs://?*/?* ]] || fail "WORKDIR=$WORKDIR must be gs://BUCKET/RUN: the hosts have no disk in common"
}
