"""Sums over the kernels of a step."""

import pytest

from sedd_jax.performance import costs, gpus
from sedd_jax.runtime import accelerators

# Two layers of an unrolled loop run kernels of their own that do the same.
TEXT = """
ENTRY %main (p: f32[4096,4096]) -> f32[4096,4096] {
  %p = f32[4096,4096]{1,0} parameter(0)
  %add.1 = f32[4096,4096]{1,0} add(%p, %p), metadata={op_name="jit(f)/jvp(ScoreNetwork)/blocks/add"}
  %add.2 = f32[4096,4096]{1,0} add(%add.1, %p), metadata={op_name="jit(f)/jvp(ScoreNetwork)/blocks/add"}
  %moved = f32[4096,4096]{1,0:S(1)} copy(%add.2), metadata={op_name="jit(f)/copy"}
  ROOT %out = f32[4096,4096]{0,1} transpose(%moved), dimensions={1,0}, metadata={op_name="jit(f)/transpose"}
}
"""
SIZE = 4 * 4096**2


def test_sums_of_a_gpu():
    found = costs.costs(TEXT.replace(":S(1)", ""), accelerators.H200_SXM, gpus.GPUS["h200"], 0.5)
    assert found["scopes"]["layers, forward"]["calls"] == 2
    assert found["scopes"]["layers, forward"]["bytes_read"] == 4 * SIZE
    assert found["kinds"].keys() == {"elementwise", "copies"}
    assert found["dearest"][0]["calls"] == 2
    assert found["dearest"][0]["where"] == "jit(f)/jvp(ScoreNetwork)/blocks/add"
    assert found["dearest"][0]["arrays"] == ["f32[4096,4096]"]
    kernels = sum(of["seconds"] for of in found["kinds"].values())
    assert kernels < found["seconds"] < 1.1 * kernels
    assert list(found["kinds"]) == ["elementwise", "copies"]


def test_a_transfer_to_the_chip_of_a_tpu_runs_beside_kernels():
    chip = accelerators.TPU_V5E
    found = costs.costs(TEXT, chip, None, 0.5)
    assert found["kinds"]["transfers"]["bytes_read"] == SIZE
    # Two sums of three arrays, and what the last kernel writes. The transfer shares the memory's rate.
    assert found["seconds"] == pytest.approx((6 + 1 + 1) * SIZE / chip.hbm_bandwidth)
    # While the matrix units work, memory has time for it.
    product = "  %product = f32[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}\n  ROOT"
    found = costs.costs(TEXT.replace("  ROOT", product), chip, None, 0.5)
    assert found["seconds"] == pytest.approx((6 + 1) * SIZE / chip.hbm_bandwidth + 2 * 4096**3 / chip.peak_flops)
