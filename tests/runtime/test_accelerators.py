"""The table of accelerators: device kinds as JAX spells them, and plausible figures."""

import jax
import pytest

from sedd_jax.runtime import accelerators


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H100", "tpu v4", "TPU v9"])
def test_unknown_kinds_have_no_peak(kind):
    assert accelerators.find(kind) is None


def test_the_kind_of_this_cpu_has_no_peak():
    assert accelerators.find(jax.devices("cpu")[0].device_kind) is None


@pytest.mark.parametrize(
    ("kind", "peak_flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),  # a JAX device is one of the two cores of a chip
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),  # dense: half of the rate with sparsity
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_peak_is_dense_and_per_device(kind, peak_flops):
    accelerator = accelerators.find(kind)
    assert accelerator is not None
    assert accelerator.peak_flops == peak_flops


@pytest.mark.parametrize("kind", accelerators.ACCELERATORS)
def test_units_are_flops_and_bytes(kind):
    accelerator = accelerators.ACCELERATORS[kind]
    assert 1e14 <= accelerator.peak_flops < 3e15
    assert 15e9 < accelerator.hbm_bytes < 200e9
    assert 2e11 < accelerator.hbm_bandwidth < 1e13
    # FLOPs per byte at which a program is no longer bound by memory. A wrong power of ten falls out of this range.
    assert 100 < accelerator.peak_flops / accelerator.hbm_bandwidth < 1000
