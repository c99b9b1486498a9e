"""Peak compute, memory and bandwidth of accelerators, for model FLOP utilization and to tell what fits in memory.

Keys are `jax.Device.device_kind`. For a TPU that is the runtime's name, as `jax.experimental.topologies` spells it. For
a GPU it is the name that the CUDA driver gives. Numbers are per JAX device, from the vendors' public pages:

- TPU: https://docs.cloud.google.com/tpu/docs/ followed by v4, v5e, v5p, v6e or tpu7x, "System architecture". On v4 and
  v5p the two cores of a chip are one JAX device. On TPU7x each core is a device, so its row is half of the published
  chip. Interconnect bandwidth is published for both directions together (v5e 400 GB/s, v5p and TPU7x 1200, v6e 800);
  the rows hold half of it. For v4 it is from Jouppi et al. 2023 (arXiv 2304.01433): six links of 50 GB/s. The network
  between slices is published per chip (v5p 50 Gb/s, v6e and TPU7x 100) or per pod of 256 chips (v5e 6.4 Tb/s). For v4
  it is not published.
- V100: https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
- A100: https://www.nvidia.com/en-us/data-center/a100/, "Specifications".
- L4, L40S, H100, H200: https://www.nvidia.com/en-us/data-center/ followed by l4, l40s, h100 or h200, "Specifications".
  These give matrix rates "with sparsity"; a dense product reaches half of that.
- B200: https://www.nvidia.com/en-us/data-center/dgx-b200/, "Specifications", one eighth of the machine.
- Between the GPUs of a host: NVLink from the same pages, published for both directions together (A100 600 GB/s, H100
  and H200 900, B200 1800), and for the L40S its PCIe bus (64); the rows hold half of it. Between hosts: the network
  cards of NVIDIA's DGX machines, one a GPU (https://docs.nvidia.com/dgx/: A100 200 Gb/s, H100, H200 and B200 400). For
  hosts of L40S there is no such figure.

Memory is the nominal size; a program may use less (`jax.Device.memory_stats()["bytes_limit"]`).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Peak figures of one JAX device.

    Attributes:
        name: the device's name for people.
        peak_flops: dense bfloat16 FLOP/s.
        hbm_bytes: bytes of device memory.
        hbm_bandwidth: bytes/s between device memory and chip.
        ici_bandwidth: bytes/s that a device sends over all links to its neighbours, on a GPU those of its host; 0 if
            `sedd plan` does not know the device.
        dcn_bandwidth: bytes/s that a device sends over the data-center network to other slices or hosts; 0 if no figure
            is published.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float = 0.0
    dcn_bandwidth: float = 0.0


# Google gives memory in binary gigabytes, NVIDIA in decimal ones.
GIB = 2**30
GB = 10**9

TPU_V4 = Accelerator(name="TPU v4", peak_flops=275e12, hbm_bytes=32 * GIB, hbm_bandwidth=1200e9, ici_bandwidth=300e9)
TPU_V5E = Accelerator(
    name="TPU v5e",
    peak_flops=197e12,
    hbm_bytes=16 * GIB,
    hbm_bandwidth=819e9,
    ici_bandwidth=200e9,
    dcn_bandwidth=6.4e12 / 8 / 256,
)
TPU_V5P = Accelerator(
    name="TPU v5p",
    peak_flops=459e12,
    hbm_bytes=95 * GIB,
    hbm_bandwidth=2765e9,
    ici_bandwidth=600e9,
    dcn_bandwidth=50e9 / 8,
)
TPU_V6E = Accelerator(
    name="TPU v6e",
    peak_flops=918e12,
    hbm_bytes=32 * GIB,
    hbm_bandwidth=1638e9,
    ici_bandwidth=400e9,
    dcn_bandwidth=100e9 / 8,
)
TPU_7X = Accelerator(
    name="TPU7x, one of two cores",
    peak_flops=2307e12 / 2,
    hbm_bytes=96 * GIB,
    hbm_bandwidth=7380e9 / 2,
    ici_bandwidth=600e9 / 2,
    dcn_bandwidth=100e9 / 8 / 2,
)
# Volta has matrix units for float16 only, so its rows hold that rate. bfloat16 runs far below it.
V100_SXM_16 = Accelerator(name="V100 SXM 16 GB", peak_flops=125e12, hbm_bytes=16 * GB, hbm_bandwidth=900e9)
V100_SXM_32 = Accelerator(name="V100 SXM 32 GB", peak_flops=125e12, hbm_bytes=32 * GB, hbm_bandwidth=900e9)
V100_PCIE_16 = Accelerator(name="V100 PCIe 16 GB", peak_flops=112e12, hbm_bytes=16 * GB, hbm_bandwidth=900e9)
V100_PCIE_32 = Accelerator(name="V100 PCIe 32 GB", peak_flops=112e12, hbm_bytes=32 * GB, hbm_bandwidth=900e9)
A100_SXM_40 = Accelerator(name="A100 SXM 40 GB", peak_flops=312e12, hbm_bytes=40 * GB, hbm_bandwidth=1555e9)
A100_SXM_80 = Accelerator(
    name="A100 SXM 80 GB",
    peak_flops=312e12,
    hbm_bytes=80 * GB,
    hbm_bandwidth=2039e9,
    ici_bandwidth=600e9 / 2,
    dcn_bandwidth=200e9 / 8,
)
A100_PCIE_40 = Accelerator(name="A100 PCIe 40 GB", peak_flops=312e12, hbm_bytes=40 * GB, hbm_bandwidth=1555e9)
A100_PCIE_80 = Accelerator(name="A100 PCIe 80 GB", peak_flops=312e12, hbm_bytes=80 * GB, hbm_bandwidth=1935e9)
L4 = Accelerator(name="L4", peak_flops=242e12 / 2, hbm_bytes=24 * GB, hbm_bandwidth=300e9)
L40S = Accelerator(name="L40S", peak_flops=733e12 / 2, hbm_bytes=48 * GB, hbm_bandwidth=864e9, ici_bandwidth=64e9 / 2)
H100_SXM = Accelerator(
    name="H100 SXM",
    peak_flops=1979e12 / 2,
    hbm_bytes=80 * GB,
    hbm_bandwidth=3350e9,
    ici_bandwidth=900e9 / 2,
    dcn_bandwidth=400e9 / 8,
)
H100_PCIE = Accelerator(name="H100 PCIe", peak_flops=1513e12 / 2, hbm_bytes=80 * GB, hbm_bandwidth=2000e9)
H100_NVL = Accelerator(name="H100 NVL", peak_flops=1671e12 / 2, hbm_bytes=94 * GB, hbm_bandwidth=3900e9)
H200_SXM = Accelerator(
    name="H200 SXM",
    peak_flops=1979e12 / 2,
    hbm_bytes=141 * GB,
    hbm_bandwidth=4800e9,
    ici_bandwidth=900e9 / 2,
    dcn_bandwidth=400e9 / 8,
)
H200_NVL = Accelerator(name="H200 NVL", peak_flops=1671e12 / 2, hbm_bytes=141 * GB, hbm_bandwidth=4800e9)
B200 = Accelerator(
    name="B200",
    peak_flops=4500e12 / 2,
    hbm_bytes=180 * GB,
    hbm_bandwidth=8000e9,
    ici_bandwidth=1800e9 / 2,
    dcn_bandwidth=400e9 / 8,
)

ACCELERATORS = {
    "TPU v4": TPU_V4,
    "TPU v5 lite": TPU_V5E,
    "TPU v5e": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU v6e": TPU_V6E,
    "TPU7x": TPU_7X,
    "Tesla V100-SXM2-16GB": V100_SXM_16,
    "Tesla V100-SXM2-32GB": V100_SXM_32,
    "Tesla V100-PCIE-16GB": V100_PCIE_16,
    "Tesla V100-PCIE-32GB": V100_PCIE_32,
    "NVIDIA A100-SXM4-40GB": A100_SXM_40,
    "NVIDIA A100-SXM4-80GB": A100_SXM_80,
    "NVIDIA A100-PCIE-40GB": A100_PCIE_40,
    "NVIDIA A100 80GB PCIe": A100_PCIE_80,
    "NVIDIA L4": L4,
    "NVIDIA L40S": L40S,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H200": H200_SXM,
    "NVIDIA H200 NVL": H200_NVL,
    "NVIDIA B200": B200,
}


def find(device_kind: str) -> Accelerator | None:
    """The accelerator with this `jax.Device.device_kind`, or None for one not in the table, such as a CPU."""
    return ACCELERATORS.get(device_kind)
