"""`sedd plan` compiles for TPUs that are not here; in a process of its own, since this one's JAX has other devices."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sedd_jax import cli

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu-plan]'"
)
SMALL = (
    "--config.network.hidden_size=256",
    "--config.network.num_layers=4",
    "--config.network.num_heads=4",
    "--config.data.length=256",
    "--vocab_size=8191",
)


def plan(*arguments):
    """Exit status, standard output and standard error of `sedd plan`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "sedd_jax", "plan", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_step_that_fits():
    status, out, err = plan(*SMALL, "--topology=v5e:2x2", "--config.training.batch_size=64", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["fits"]
    assert result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    memory = result["memory_gib"]
    # Matrices of the blocks, their modulations, embedding and head; norms, biases and sigma's embedding are the rest.
    matrices = 4 * (4 * (12 * 256**2 + 6 * 128 * 256) + 2 * 8192 * 256) / 2**30
    assert matrices < memory["parameters"] == memory["moving average"] < 1.03 * matrices
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-4)
    # Gradients are summed over the four chips once: those of bfloat16 products in bfloat16, the others in float32.
    sent = sum(of["bytes_sent"] for of in result["collectives"].values())
    assert sent == pytest.approx(2 * 3 / 4 * (memory["parameters"] * 2**30 - 2 * 4 * 12 * 256**2), rel=0.01)
    flops = 64 * 256 / 4 * (6 * (4 * 12 * 256**2 + 256 * 8192) + 12 * 4 * 256 * 256)
    assert result["flops_per_device"] == pytest.approx(flops)
    slowest = max(result["seconds"].values())
    assert result["tokens_per_second"] == pytest.approx(64 * 256 / slowest)
    assert result["utilization"] == pytest.approx(flops / 197e12 / slowest)
    assert result["days"] == pytest.approx(400_000 * slowest / 86_400)
    assert "fits" in out
    assert err == ""


def test_a_step_that_does_not_fit_gets_a_change_that_was_compiled():
    status, out, _ = plan(*SMALL, "--topology=v5e:2x2", "--config.training.batch_size=8192")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "G) exceeds available HBM (15.75G)" in out
    assert "fits with --config.network.remat=blocks" in out


def test_a_sampling_step_on_two_slices():
    status, out, err = plan(
        *SMALL, "--topology=v5e:2x2", "--num_slices=2", "--sample", "--config.sampling.num_samples=8"
    )
    assert status == 0, err
    assert "sampling step of 256 x 4, 8 sequences of 256, 8191 tokens" in out
    assert "on 2 x v5e:2x2: 8 devices (TPU v5e), mesh data 8, fsdp 1, tensor 1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5litepod:4x4"], "--topology=v5litepod:4x4: Invalid TPU external name: TPU v5litepod; known are"),
        (["--topology=v5e:4x4", "--config.training.batch_size=10"], "leaves 10 sequences for 16 devices"),
        (["--topology=v5e:4x4", "--config.mesh.tensor=5"], "does not fill 16 devices"),
        (["--topology=v5e:4x4", "--num_slices=0"], "--num_slices=0 must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    status, _, err = plan(*arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_topology_must_be_given(capsys):
    assert cli.main(["plan"]) == 2
    assert "--topology=NAME must be given" in capsys.readouterr().err
