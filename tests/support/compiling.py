"""How XLA compiles in tests, in this process and in those that it starts."""

import importlib.metadata

# The options under which one function is compiled that computes for long: `jax.jit(fn, compiler_options=...)`.
OPTIMISED = {"xla_backend_optimization_level": 1}

_level = 1


def choose_level(marks: str) -> None:
    """Sets how much XLA optimises in the tests that `pytest -m` asks for.

    The quick ones spend more time compiling than computing, so XLA optimises nothing for them. Some of the rest draw
    hundreds of millions of numbers.
    """
    global _level
    _level = 0 if marks == "not slow" else 1


def flags(num_devices: int) -> str:
    """XLA_FLAGS for a process with CPU devices."""
    found = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level={_level}"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The older of its two code generators compiles three times as fast; later versions have only the newer one.
        found += " --xla_cpu_use_fusion_emitters=false"
    return found
