#!/usr/bin/env bash
# XLA compiler flags for TPUs (LIBTPU_INIT_ARGS) and GPUs (XLA_FLAGS). They are set only here.
#
#   source launch/accelerator_flags.sh
#
# Every launcher sources this file. Flags that are already in these variables come last, so they win. JAX and libtpu
# refuse to start with an unknown flag; tests/test_launch.py starts both with these flags. `sedd plan` uses them, too.

tpu_flags=(
  # Overlaps the all-reduce of gradients over mesh.data with computation. All-gathers over mesh.fsdp overlap by default.
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
)
gpu_flags=(
  # Schedules NCCL's collectives to overlap with kernels.
  --xla_gpu_enable_latency_hiding_scheduler=true
)
export LIBTPU_INIT_ARGS="${tpu_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
export XLA_FLAGS="${gpu_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
unset tpu_flags gpu_flags
