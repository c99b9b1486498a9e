"""`sedd plan` compiles for TPUs without having one. It runs in its own process, since JAX has other devices here."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from sedd_jax import config as configs
from sedd_jax.cli import main as cli
from sedd_jax.performance import plan as program
from sedd_jax.performance import slices
from sedd_jax.runtime import errors

# Compiles for TPUs, in processes of their own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu-plan]'"
    ),
]
HIDDEN, LAYERS, LENGTH, BATCH = 128, 2, 128, 64
SMALL = (
    "--topology=v5e:2x2",
    f"--config.network.hidden_size={HIDDEN}",
    "--config.network.num_heads=2",
    f"--config.data.length={LENGTH}",
    "--vocab_size=1023",
)
BASELINE = ("--config.graph.name=autoregressive", "--config.network.scale_by_sigma=False")
COMMANDS = {
    "fits": (*SMALL, f"--config.network.num_layers={LAYERS}", f"--config.training.batch_size={BATCH}", "--json"),
    "too large": (
        "--topology=v5e:2x2",
        "--config.network.hidden_size=256",
        "--config.network.num_layers=4",
        "--config.network.num_heads=4",
        "--config.data.length=256",
        "--vocab_size=8191",
        "--config.training.batch_size=8192",
    ),
    "baseline": (*SMALL, "--config.network.num_layers=1", *BASELINE, "--sample", "--config.sampling.num_samples=4"),
    "two slices": (
        *(*SMALL, "--config.network.num_layers=1", "--num_slices=2"),
        *("--sample", "--config.sampling.num_samples=8"),
    ),
}
IN_TURN = """
import contextlib, io, json, sys
from sedd_jax.runtime import hosts
hosts.compile_for_others()
from sedd_jax.cli import main as cli

for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["plan", *command])
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def run_alone(*arguments):
    """Runs Python in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def plan_in_turn(commands):
    """Exit status, standard output and standard error of each `sedd plan`, all in one process."""
    done = run_alone("-c", IN_TURN, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def planned():
    """What `sedd plan` says, by the name of its command in `COMMANDS`."""
    return dict(zip(COMMANDS, plan_in_turn(list(COMMANDS.values())), strict=True))


def test_a_step_that_fits(planned):
    status, out, err = planned["fits"]
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["fits"]
    assert result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    memory = result["memory_gib"]
    # Matrices of the blocks, their modulations, that of the end, sigma's, embedding and head. The rest is norms and
    # biases.
    blocks, cond = LAYERS * 12 * HIDDEN**2, 128
    matrices = blocks + (6 * LAYERS + 2) * cond * HIDDEN + (256 + cond) * cond + 2 * 1024 * HIDDEN
    assert 4 * matrices / 2**30 < memory["parameters"] == memory["moving average"] < 1.03 * 4 * matrices / 2**30
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    # Gradients are summed over the four chips once: in bfloat16 for bfloat16 products, in float32 for the others.
    sent = sum(of["bytes_sent"] for of in result["collectives"].values())
    assert sent == pytest.approx(2 * 3 / 4 * (memory["parameters"] * 2**30 - 2 * blocks), rel=0.01)
    flops = BATCH * LENGTH / 4 * (6 * (blocks + HIDDEN * 1024 / 2) + 12 * LAYERS * LENGTH * HIDDEN)
    assert result["flops_per_device"] == pytest.approx(flops, rel=1e-3)
    slowest = max(result["seconds"].values())
    assert result["tokens_per_second"] == pytest.approx(BATCH * LENGTH / slowest)
    assert result["utilization"] == pytest.approx(flops / 197e12 / slowest, rel=1e-3)
    assert result["days"] == pytest.approx(400_000 * slowest / 86_400)
    assert "fits" in out
    assert err == ""
    # What the kernels of the matrix units do is what the model needs, with a head on half of the positions.
    done = sum(of["flops"] for of in result["kernels"]["kinds"].values())
    assert done == pytest.approx(flops, rel=0.15)
    assert result["kernels"]["seconds"] > result["seconds"]["arithmetic"]
    estimate = max(result["kernels"]["seconds"], slowest)
    assert result["estimate"]["seconds"] == pytest.approx(estimate)
    assert result["estimate"]["utilization"] == pytest.approx(flops / 197e12 / estimate, rel=1e-3)
    assert "nothing was measured on a TPU" in out


def test_a_step_that_does_not_fit_gets_a_change_that_was_compiled(planned):
    status, out, _ = planned["too large"]
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "G) exceeds available HBM (15.75G)" in out
    assert "fits with --config.network.remat=blocks" in out


@pytest.mark.parametrize(("slice_devices", "num_slices", "fsdp"), [(16, 1, 16), (4, 2, 4), (512, 2, 128)])
def test_changes_split_the_model_within_a_slice_into_equal_parts(slice_devices, num_slices, fsdp):
    devices = slice_devices * num_slices
    config = configs.parse(configs.merge({"training": {"batch_size": 4 * devices}}))
    changes = list(program.remedies(config, slice_devices, num_slices))
    assert changes[:3] == [
        {"network.remat": "blocks"},
        {"network.remat": "blocks", "mesh.data": devices // fsdp, "mesh.fsdp": fsdp},
        {"network.remat": "blocks", "training.num_micro_batches": 2},
    ]
    assert changes[-1] == changes[1] | {"training.num_micro_batches": 4}


@pytest.mark.parametrize("slice_devices", [16, 24])
def test_changes_leave_every_device_as_much(slice_devices):
    config = configs.parse(configs.merge({"training": {"batch_size": 3 * slice_devices}}))
    for change in program.remedies(config, slice_devices, 1):
        changed = configs.parse(configs.merge(configs.flatten(configs.to_dict(config)) | change))
        per_micro_batch = changed.training.batch_size // changed.training.num_micro_batches
        assert per_micro_batch % slice_devices == 0
        for size in (changed.network.hidden_size, changed.network.cond_dim):
            assert size % changed.mesh.fsdp == 0


def test_a_sample_of_the_baseline_takes_a_step_a_token(planned):
    status, out, err = planned["baseline"]
    assert status == 0, err
    assert f"for samples of {LENGTH - 1} steps" in out


def test_a_sampling_step_on_two_slices(planned):
    status, out, err = planned["two slices"]
    assert status == 0, err
    assert f"sampling step of {HIDDEN} x 1, 8 sequences of {LENGTH}, 1023 tokens" in out
    assert "estimate " in out
    assert "on 2 x v5e:2x2: 8 devices (TPU v5e), mesh data 8, fsdp 1, tensor 1" in out


def test_wrong_arguments():
    wrong = {
        ("--topology=v5e:4x4", "--config.training.batch_size=10"): "leaves 10 sequences for 16 devices",
        ("--topology=v5e:4x4", "--config.mesh.tensor=5"): "does not fill 16 devices",
        ("--topology=v5e:4x4", "--num_slices=0"): "--num_slices=0 must be at least 1",
        ("--topology=v5e:4x4", "--num_hosts=2"): "--num_hosts=2 is for GPUs: a larger slice has more hosts",
        ("--topology=v5e:3x5",): "--topology=v5e:3x5 is no slice of a v5e, which has chips along 2 axes, even along "
        "the first two, 256",
    }
    for (status, _, err), message in zip(plan_in_turn(list(wrong)), wrong.values(), strict=True):
        assert status == 1
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["", ":", "v5e", "v5litepod:4x4", "h300:8", "v7x:2x2x1", "v3:2x2", "V5E:4x4", "v5:2x2x2"]
)
def test_names_that_are_no_slice_get_the_known_ones(name):
    given = f"topology={name or repr(name)}"
    with pytest.raises(errors.UserError, match=f"^{given} is no .*(v4, v5e, v5p, v6e, tpu7x|v5e:1x1, 2x2, 2x4, 4x4)"):
        program.check_topology(name)


@pytest.mark.parametrize(
    ("generation", "shapes", "accepted"),
    [
        ("v5e", ["", "4", "4x", "4x4x4", "0x4", "-4x4", "1x2", "3x5", "16x32", "axb", "4x²"], "v5e:1x1, 2x2, 2x4, 4x4"),
        ("v5p", ["", "4x4", "1x1x1", "1x1", "3x3x3", "0x2x2", "16x16x25", "2x2x2x1"], "v5p:2x2x1, 2x2x2, 2x2x4, 2x4x4"),
    ],
)
def test_shapes_that_are_no_slice_get_the_accepted_ones(generation, shapes, accepted):
    for shape in shapes:
        with pytest.raises(errors.UserError, match=f"^topology={generation}:{shape} is no .* at most: {accepted}"):
            program.check_topology(f"{generation}:{shape}")


SLICES = """
import json, sys
import jax
from sedd_jax.performance import plan
from sedd_jax.runtime import accelerators

def look(topology, num_slices):
    plan.check_topology(topology)
    devices = plan.make_devices(topology, num_slices)
    one = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], "x"), jax.sharding.PartitionSpec())
    too_large = jax.ShapeDtypeStruct((2**18, 2**18), "float32", sharding=one)
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
    accelerator = accelerators.find(devices[0].device_kind)
    in_slices = len({getattr(device, "slice_index", 0) for device in devices})
    return accelerator.name, len(devices), in_slices, accelerator.hbm_bytes, message

print(json.dumps([look(*one) for one in json.loads(sys.argv[1])]))
"""


def test_devices_and_their_memory_are_what_the_compiler_says():
    """For every generation: JAX's devices, their accelerator, and the memory that a program may use."""
    half = "TPU7x, one of two cores"
    expected = {
        ("v4:2x2x1", 1): ("TPU v4", 4),
        ("v4:2x2x2", 4): ("TPU v4", 32),
        ("v5e:1x1", 1): ("TPU v5e", 1),
        ("v5e:4x4", 2): ("TPU v5e", 32),
        ("v5e:16x16", 1): ("TPU v5e", 256),
        ("v5p:2x2x2", 1): ("TPU v5p", 8),
        ("v5p:16x16x24", 1): ("TPU v5p", 6144),
        ("v6e:1x1", 1): ("TPU v6e", 1),
        ("v6e:4x4", 1): ("TPU v6e", 16),
        ("tpu7x:2x2x1", 1): (half, 8),
        ("tpu7x:4x4x4", 1): (half, 128),
    }
    assert {topology.partition(":")[0] for topology, _ in expected} == slices.SLICES.keys()
    done = run_alone("-c", SLICES, json.dumps(list(expected)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for ((_, num_slices), (name, num_devices)), (*what, hbm_bytes, message) in zip(
        expected.items(), found, strict=True
    ):
        assert what == [name, num_devices, num_slices]
        available = float(re.search(r"exceeds available HBM \(([\d.]+)G\)", message).group(1)) * 2**30
        assert 0.95 < available / hbm_bytes < 1.01


SUM = """
import json
import jax
from jax.sharding import NamedSharding, PartitionSpec
from sedd_jax.performance import collectives, plan
from sedd_jax.runtime import sharding

mesh = sharding.make_mesh(sharding.MeshConfig(), plan.make_devices("v5e:2x2", num_slices=2))
parts = jax.ShapeDtypeStruct((8, 2**20), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
whole = NamedSharding(mesh, PartitionSpec())
text = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(parts).compile().as_text()
print(json.dumps([(one.between_slices, one.bytes_sent) for one in collectives.collectives(text, num_slices=2)]))
"""


def test_a_sum_over_two_slices_crosses_the_network_between_them_in_parts():
    """Each of the 4 devices of a slice exchanges its quarter of the sum with its peer in the other slice."""
    done = run_alone("-c", SUM)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(sent for between_slices, sent in found if between_slices) == 4 * 2**20 / 4
    assert sum(sent for between_slices, sent in found if not between_slices) == 2 * 3 / 4 * 4 * 2**20


def test_topology_must_be_given(capsys):
    assert cli.main(["plan"]) == 2
    assert "--topology=NAME must be given" in capsys.readouterr().err
