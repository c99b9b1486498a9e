#!/usr/bin/env bash
# Flags of XLA's compilers for TPUs (LIBTPU_INIT_ARGS) and GPUs (XLA_FLAGS): the one place where they are set.
#
#   source launch/accelerator_flags.sh
#
# Every launcher sources it. What these variables hold already comes last, so it wins. A flag that JAX or libtpu does
# not know ends the program at its start: tests/test_launch.py starts both with these. `sedd plan` obeys them too.

tpu_flags=(
  # Sums of gradients over mesh.data run beside computation, in pieces. Gathers of weights over mesh.fsdp do so anyway.
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
)
gpu_flags=(
  # Orders the step so that NCCL's collectives run beside kernels instead of between them.
  --xla_gpu_enable_latency_hiding_scheduler=true
)
export LIBTPU_INIT_ARGS="${tpu_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
export XLA_FLAGS="${gpu_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
unset tpu_flags gpu_flags
