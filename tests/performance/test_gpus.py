"""`sedd plan` compiles for GPUs without having one. It runs in its own process, since JAX has other devices here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sedd_jax.performance import gpus
from sedd_jax.performance import plan as program
from sedd_jax.runtime import accelerators, errors

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's plugin for GPUs is not installed: pip install '.[gpu-plan]'"),
]
SMALL = (
    "--config.network.hidden_size=256",
    "--config.network.num_layers=1",
    "--config.network.num_heads=4",
    "--config.data.length=128",
    "--config.training.batch_size=32",
    "--config.sampling.num_samples=4",
    "--vocab_size=8191",
)


def plan(*arguments):
    """Exit status, standard output and standard error of `sedd plan`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "sedd_jax", "plan", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def planned(*arguments):
    status, out, err = plan(*SMALL, *arguments, "--json")
    assert status == 0, err
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize(
    ("topology", "groups", "message"),
    [
        ("h100", {}, "topology=h100 has no number of GPUs of a host, from 1 to 8: h100:8, and num_hosts=N for several"),
        ("a100:0", {}, "topology=a100:0 has no number of GPUs of a host"),
        ("h100:16", {}, "topology=h100:16 has no number of GPUs of a host"),
        ("h100:²", {}, "topology=h100:² has no number of GPUs of a host"),
        ("h100:2x4", {}, "topology=h100:2x4 has no number of GPUs of a host"),
        ("v100:8", {}, "topology=v100:8 is no such TPU or GPU: known are .*; and a100, h100, h200, b200, l40s"),
        ("h100:8", {"num_slices": 2}, "num_slices=2 is for TPUs: num_hosts=N for several hosts of GPUs"),
    ],
)
def test_wrong_arguments(topology, groups, message):
    with pytest.raises(errors.UserError, match=f"^{message}"):
        program.check_topology(topology, **groups)


def test_every_gpu_has_the_row_of_its_accelerator():
    for gpu in gpus.GPUS.values():
        assert accelerators.find(gpu.device_kind) is gpu.accelerator
        assert gpus.find(gpu.device_kind) is gpu
    assert gpus.find("TPU v5e") is None


@pytest.mark.slow
@pytest.mark.skipif(HAS_PLUGIN, reason="JAX's plugin for GPUs is installed")
@pytest.mark.parametrize("value", ["x", "75%", "-1", "0", "nan", "inf"])
def test_a_share_of_memory_that_is_none_is_named(monkeypatch, value):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
    with pytest.raises(errors.UserError, match=rf"XLA_PYTHON_CLIENT_MEM_FRACTION={value}, which is no share of a mem"):
        gpus.usable_share()


def test_without_the_plugin_it_says_what_to_install():
    status, _, err = plan(*SMALL, "--topology=h100:1")
    assert (status, err) == (1, "sedd plan: plan needs JAX's plugin for GPUs: pip install 'sedd_jax[gpu-plan]'\n")


class TestCompiled:
    pytestmark = compiles

    def test_two_hosts_of_eight(self):
        result, out = planned("--topology=h100:8", "--num_hosts=2", "--config.mesh.fsdp=8")
        assert result["fits"]
        assert (result["num_devices"], result["mesh"]) == (16, {"data": 2, "fsdp": 8, "tensor": 1})
        assert "on 2 x h100:8: 16 devices (H100 SXM), mesh data 2, fsdp 8, tensor 1" in out
        # Weights are gathered within a host, and gradients are summed over both.
        assert result["collectives"]["all-gather"]["bytes_sent"] > 0
        assert result["collectives"]["all-reduce between hosts"]["bytes_sent"] > 0
        assert result["seconds"]["between hosts"] > 0
        networks = result["seconds"]["interconnect"] + result["seconds"]["between hosts"]
        assert result["estimate"]["seconds"] == pytest.approx(result["kernels"]["seconds"] + networks)

    @pytest.mark.parametrize("name", list(gpus.GPUS))
    def test_every_gpu(self, name):
        """The matrix units do what the model needs, with a head at half of the positions; attention is cuDNN's."""
        result, out = planned(f"--topology={name}:1")
        kinds = result["kernels"]["kinds"]
        assert sum(of["flops"] for of in kinds.values()) == pytest.approx(result["flops_per_device"], rel=0.15)
        assert kinds["attention"]["calls"] == kinds["attention, gradient"]["calls"] == 1
        assert result["collectives"] == {}
        assert max(result["seconds"].values()) < result["estimate"]["seconds"]
        assert ("67.5 ms against 65.9" in out) == (name == "h200")

    def test_a_step_may_use_what_jax_takes_for_arrays(self, monkeypatch):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.0001")
        status, out, _ = plan(*SMALL, "--topology=l40s:1", "--sample")
        assert status == 0
        assert "DOES NOT FIT: 0." in out
        assert "GiB are needed, and JAX takes 0.00 for arrays (XLA_PYTHON_CLIENT_MEM_FRACTION=0.0001" in out
