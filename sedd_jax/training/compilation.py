"""What XLA is asked for when it compiles the training step."""

from sedd_jax import config as configs
from sedd_jax.runtime import sharding

# XLA and cuDNN use only kernels that give the same bits every time. They also take the first that fits instead of the
# fastest: another process would time them differently and choose others, which round differently.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True, "xla_gpu_exclude_nondeterministic_ops": True}
# No CUDA graphs. In a graph, kernels of cuBLAS and cuDNN do not say which operation they belong to.
_PROFILED = {"xla_gpu_enable_command_buffer": ""}


def options(training: configs.TrainingConfig) -> dict[str, bool | str]:
    """Compiler options for the devices of the current mesh. CPUs and TPUs need none.

    All allowed versions of XLA know them (`tests/training/test_compilation.py`).
    """
    if sharding.platform() != "gpu":
        return {}
    return (_DETERMINISTIC if training.deterministic else {}) | (_PROFILED if training.profile else {})
