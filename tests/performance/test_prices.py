"""Seconds of kernels."""

import dataclasses

import pytest

from sedd_jax.performance import costs, gpus, hlo, kernels
from sedd_jax.runtime import accelerators

NOTHING = kernels.Kernel(
    name="k",
    kind="elementwise",
    scope="head",
    where="",
    arrays=(hlo.Array("f32", (1,)),),
    calls=1.0,
    bytes_read=0.0,
    bytes_written=0.0,
    flops=0.0,
    operations=0.0,
    is_triton=False,
)
H200 = gpus.GPUS["h200"]


def kernel(**fields):
    return dataclasses.replace(NOTHING, **fields)


@pytest.mark.parametrize(
    ("fields", "milliseconds"),
    [
        # 3.8 GB of float32 at 3.8 TB/s; a product of 790 TFLOPs a second; the backward pass of attention at 365.
        ({"bytes_read": 1.9e9, "bytes_written": 1.9e9}, 1),
        ({"kind": "products", "flops": 0.79e12, "bytes_read": 1e6}, 1),
        ({"kind": "attention, gradient", "flops": 0.365e12}, 1),
        ({"bytes_read": 2.6e9, "is_triton": True}, 1),
        ({"bytes_written": 1.7e9, "kind": "fills", "arrays": (hlo.Array("bf16", (8,)),)}, 1),
        ({"bytes_read": 2.8e9, "arrays": (hlo.Array("bf16", (8,)),)}, 1),
        # Of a small one part is still in the cache.
        ({"bytes_read": 0.038e9, "arrays": (hlo.Array("bf16", (8,)),)}, 0.01),
        ({"operations": 132 * 128 * 1.755e6}, 1),
    ],
)
def test_rates_that_an_h200_was_measured_at(fields, milliseconds):
    start = costs.on_gpu(NOTHING, H200)
    assert 0 < start < 1e-5
    assert costs.on_gpu(kernel(**fields), H200) - start == pytest.approx(1e-3 * milliseconds, rel=1e-3)


def test_other_gpus_differ_by_peak_and_bandwidth():
    moves, multiplies = kernel(bytes_read=1e10), kernel(kind="products", flops=1e14)
    h100, a100 = gpus.GPUS["h100"], gpus.GPUS["a100"]
    assert costs.on_gpu(moves, h100) / costs.on_gpu(moves, H200) == pytest.approx(4800 / 3350, rel=0.01)
    assert costs.on_gpu(multiplies, h100) == costs.on_gpu(multiplies, H200)
    assert costs.on_gpu(multiplies, a100) / costs.on_gpu(multiplies, H200) == pytest.approx(989.5 / 312, rel=0.01)


def test_a_tpu_is_priced_at_its_nominal_rates():
    chip = accelerators.TPU_V5E
    assert costs.on_tpu(kernel(bytes_read=800e6, bytes_written=19e6, flops=1e9), chip) == pytest.approx(1e-3)
    assert costs.on_tpu(kernel(bytes_read=1e6, flops=197e9), chip) == pytest.approx(1e-3)


def test_an_estimate_says_where_it_was_compared():
    assert "67.5 ms against 65.9" in costs.basis(accelerators.H200_SXM, True)
    assert "not measured" in costs.basis(accelerators.H100_SXM, True)
    assert "nothing was measured" in costs.basis(accelerators.TPU_V5E, False)
