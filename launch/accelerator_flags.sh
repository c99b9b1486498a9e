#!/usr/bin/env bash
# Puts the compilers' flags for TPUs (LIBTPU_INIT_ARGS) and GPUs (XLA_FLAGS) in front of those in the environment.
#
#   source launch/accelerator_flags.sh
#
# The flags, and why, are in sedd_jax/runtime/accelerator_flags.txt. `sedd` reads the same file and sets what is missing;
# this script is for launchers, whose dry runs show them, and for other programs.

flags_of() { # PREFIX: the flags that begin with it, in a line
  grep "^$1" "$(dirname "${BASH_SOURCE[0]}")/../sedd_jax/runtime/accelerator_flags.txt" | paste -sd' '
}
LIBTPU_INIT_ARGS="$(flags_of --xla_tpu_)${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
XLA_FLAGS="$(flags_of --xla_gpu_)${XLA_FLAGS:+ $XLA_FLAGS}"
export LIBTPU_INIT_ARGS XLA_FLAGS
unset -f flags_of
