"""How XLA compiles in tests, in this process and in those that it starts."""

import importlib.metadata


def flags(num_devices: int) -> str:
    """XLA_FLAGS for a process with CPU devices. Tests spend most of their time compiling, so it optimises less."""
    found = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The older of its two code generators compiles three times as fast; later versions have only the newer one.
        found += " --xla_cpu_use_fusion_emitters=false"
    return found
