"""NVIDIA GPUs to compile for that are not here."""

import dataclasses
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from sedd_jax.runtime import accelerators, errors, hosts

# GPUs of a host.
MOST_OF_A_HOST = 8
# The version of cuDNN that programs are compiled for. None needs to be installed.
_CUDNN = (9, 19)
_CUDA = (13, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the compiler needs to know about a GPU.

    Attributes:
        accelerator: its peak rates.
        device_kind: the name that the CUDA driver gives it.
        capability: compute capability.
        num_cores: streaming multiprocessors.
        lanes: 32-bit units of a multiprocessor.
        clock_ghz: boost clock.
        l2_bytes: cache.
        shared_bytes: shared memory of a multiprocessor; a block gets 1 KiB less.
        threads: threads of a multiprocessor.
    """

    accelerator: accelerators.Accelerator
    device_kind: str
    capability: tuple[int, int]
    num_cores: int
    lanes: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    threads: int = 2048

    @property
    def operations_per_second(self) -> float:
        """32-bit operations outside of the matrix units."""
        return self.num_cores * self.lanes * self.clock_ghz * 1e9

    @property
    def target(self) -> str:
        """XLA's description of the device (GpuTargetConfigProto)."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
            runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.num_cores}
              fpus_per_core: {self.lanes}
              clock_rate_ghz: {self.clock_ghz}
              memory_bandwidth: {int(self.accelerator.hbm_bandwidth)}
              device_memory_size: {self.accelerator.hbm_bytes}
              l2_cache_size: {self.l2_bytes}
              shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_bytes - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_core_limit: {self.threads}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


# Multiprocessors, caches and clocks are NVIDIA's, from the architecture white papers (Ampere GA100, Hopper GH100, Ada
# AD102) and, of the B200, what XLA's list of targets says (xla/backends/gpu/target_config/specs).
_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "num_cores": 132,
    "lanes": 128,
    "clock_ghz": 1.98,
    "l2_bytes": 50 << 20,
    "shared_bytes": 228 << 10,
}
GPUS = {
    "a100": Gpu(
        accelerator=accelerators.A100_SXM_80,
        device_kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        num_cores=108,
        lanes=64,
        clock_ghz=1.41,
        l2_bytes=40 << 20,
        shared_bytes=164 << 10,
    ),
    "h100": Gpu(accelerator=accelerators.H100_SXM, device_kind="NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": Gpu(accelerator=accelerators.H200_SXM, device_kind="NVIDIA H200", **_HOPPER),
    "b200": Gpu(
        accelerator=accelerators.B200,
        device_kind="NVIDIA B200",
        capability=(10, 0),
        num_cores=148,
        lanes=128,
        clock_ghz=1.965,
        l2_bytes=132644864,
        shared_bytes=228 << 10,
    ),
    "l40s": Gpu(
        accelerator=accelerators.L40S,
        device_kind="NVIDIA L40S",
        capability=(8, 9),
        num_cores=142,
        lanes=128,
        clock_ghz=2.52,
        l2_bytes=96 << 20,
        shared_bytes=100 << 10,
        threads=1536,
    ),
}


def find(device_kind: str) -> Gpu | None:
    """The GPU with this `jax.Device.device_kind`, or None for any other device."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == device_kind), None)


def check_topology(topology: str) -> None:
    """Raises errors.UserError if a topology is no number of GPUs of a host."""
    name, _, count = topology.partition(":")
    if not count.isascii() or not count.isdecimal() or not 0 < int(count) <= MOST_OF_A_HOST:
        raise errors.UserError(
            f"has no number of GPUs of a host, from 1 to {MOST_OF_A_HOST}",
            field="topology",
            value=topology,
            remedy=f"{name}:{MOST_OF_A_HOST}, and {errors.name('num_hosts')}=N for several hosts",
        )


def make_devices(topology: str, num_hosts: int = 1) -> list[jax.Device]:
    """GPUs to compile for, such as "h100:8". They need not exist here.

    Raises:
        errors.UserError: if JAX's plugin for GPUs is not installed.
    """
    hosts.compile_for_others()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot load programs for absent devices from it.
    name, _, count = topology.partition(":")
    try:
        with hosts.silenced():
            found = topologies.get_topology_desc(
                platform="cuda", topology=f"1x{num_hosts}x{count}", target_config=GPUS[name].target
            )
    except NotImplementedError as error:
        raise errors.UserError("plan needs JAX's plugin for GPUs", remedy="pip install 'sedd_jax[gpu-plan]'") from error
    _assume_cudnn()
    return list(found.devices)


def usable_share() -> float:
    """The share of a GPU's memory that JAX takes for arrays.

    Raises:
        errors.UserError: if the environment sets one that is none.
    """
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise errors.UserError(
            f"the environment has XLA_PYTHON_CLIENT_MEM_FRACTION={given}, which is no share of a memory",
            remedy="set it to a number such as 0.75, or unset it",
        )
    return share


def _assume_cudnn() -> None:
    """Answers for cuDNN, whose version JAX asks for when it traces attention. It is needed only where that runs."""
    from jax._src.cudnn import fused_attention_stablehlo  # No public name.

    version = _CUDNN[0] * 10_000 + _CUDNN[1] * 100
    fused_attention_stablehlo.check_cudnn_version = lambda: version
