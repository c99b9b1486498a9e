"""`sedd doctor`: the report of this CPU, exit statuses, and what a config gets on machines that are not here."""

import contextlib
import io
import json

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.model import attentions
from sedd_jax.performance import doctor, inventory, self_test
from sedd_jax.runtime import hosts, sharding

FLOAT32 = "--config.network.dtype=float32"


def examine(*arguments):
    """Exit status, text and result of `sedd doctor`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(["doctor", "--json", *arguments])
    *lines, result = out.getvalue().splitlines()
    return status, "\n".join(lines), json.loads(result)


@pytest.fixture(scope="module", autouse=True)
def bare(tmp_path_factory):
    """A machine that shows no accelerator, with memory and a cache, and small sizes to time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "DEV", tmp_path_factory.mktemp("dev"))
        patch.setattr(inventory, "nvidia", lambda: inventory.Nvidia([]))
        patch.setattr(hosts, "memory_bytes", lambda: 64 * 2**30)
        patch.setattr(inventory, "cache", lambda directory: ("kept", None))
        patch.setitem(self_test.ADD_BYTES, "cpu", 1 << 16)
        patch.setitem(self_test.PRODUCT_SIZE, "cpu", 64)
        patch.setattr(self_test, "SECONDS_PER_RATE", 0.001)
        yield


@pytest.fixture
def no_self_test(monkeypatch):
    monkeypatch.setattr(self_test, "checks", lambda run, mesh: [])
    monkeypatch.setattr(self_test, "rates", lambda config: [])


@pytest.fixture(scope="module")
def healthy():
    """The report of this machine, with an optimizer step on eight devices."""
    return examine(
        FLOAT32, "--config.data.length=128", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--vocab_size=27"
    )


def test_a_healthy_machine_passes(healthy):
    status, text, result = healthy
    assert status == 0
    assert result["trains"]
    assert result["problems"] == []
    assert text.endswith("what to change\n  nothing")
    assert [check["is_right"] for check in result["self_test"]] == [True] * 5
    assert text.count("\n  OK     ") == 5
    assert "an optimizer step of a tiny network on 8 devices: loss" in text
    assert "GB/s, no figure for this device" in text


def test_the_report_says_what_is_here_and_what_the_config_gets(healthy):
    _, text, result = healthy
    assert result["devices"]["JAX's devices"] == "8 x cpu (cpu)"
    assert hosts.processor() in text
    assert result["config"]["attention"] == "plain: auto has no other on a CPU"
    assert result["config"]["products"].startswith("float32: exact")
    # Five arrays of the parameters' size; a quarter of the matrices is on a device, as fsdp and tensor split them.
    states, width = 128, 768
    matrices = 12 * (12 * width**2 + 2 * 6 * 128 * width) + 2 * states * width
    found = float(result["config"]["memory"].split()[0])
    assert found == pytest.approx(5 * 4 * matrices / 4 / 2**30, rel=0.02)


def test_wrong_numbers_fail(monkeypatch):
    monkeypatch.setattr(attentions, "rotate", lambda x: x)
    monkeypatch.setattr(self_test, "beside_plain", lambda run, chosen: [])
    monkeypatch.setattr(self_test, "optimizer_step", lambda run, mesh: [])
    status, text, result = examine(FLOAT32)
    assert status == 1
    assert "  WRONG  loss of a tiny network beside NumPy's: differs by" in text
    assert len(result["problems"]) == 2
    assert result["rates"] == []


def test_a_gpu_that_jax_does_not_see_fails(monkeypatch, no_self_test):
    monkeypatch.setattr(inventory, "nvidia", lambda: inventory.Nvidia(["NVIDIA H200"], "590.10"))
    assert examine(FLOAT32)[0] == 0  # The tests ask for the CPU.
    monkeypatch.delenv("JAX_PLATFORMS")
    status, text, _ = examine(FLOAT32)
    assert status == 1
    assert "  FAILS  JAX does not see NVIDIA H200: no CUDA plugin is installed: pip install 'sedd_jax[gpu]'" in text
    assert "1 x NVIDIA H200, driver 590.10" in text


def test_an_attention_of_another_device_fails(monkeypatch):
    monkeypatch.setattr(self_test, "beside_numpy", lambda: [])
    status, text, result = examine("--config.network.attention=cudnn")
    assert status == 1
    assert text.count("\n  WRONG  ") == 1
    problem = (
        "--config.network.attention=cudnn runs on a GPU, not on this machine's CPU: set --config.network.attention"
    )
    first, second = result["problems"]
    assert first == {"is_fatal": True, "text": f"{problem}=auto."}
    assert "bfloat16" in second["text"]


def test_jax_that_does_not_start_is_a_report(monkeypatch, no_self_test):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(inventory, "devices", lambda: inventory.Devices([], [], "no such backend"))
    status, text, result = examine()
    assert status == 1
    assert "JAX's devices     none" in text
    assert "not run" in text
    assert [problem["is_fatal"] for problem in result["problems"]] == [True]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mesh.fsdp=3", "does not fill 8 devices: set --config.mesh.data=-1"),
        ("--config.network.cond_dim=100 --config.mesh.fsdp=8", "the mesh does not divide the network ("),
        ("--config.training.batch_size=12", "--config.training.batch_size=12 in"),
        ("--config.data.tokenizer=sentencepiece:/nowhere", "/nowhere"),
    ],
)
def test_a_config_that_cannot_train_here_fails(flag, message, no_self_test):
    status, text, result = examine(FLOAT32, *flag.split())
    assert status == 1
    assert message in result["problems"][0]["text"]
    assert "not run" in text


def test_a_model_larger_than_a_device_fails(monkeypatch, no_self_test):
    monkeypatch.setattr(hosts, "memory_bytes", lambda: 8 * 2**30)
    status, _, result = examine(FLOAT32)
    assert status == 1
    (problem,) = result["problems"]
    assert problem["text"].endswith("GiB of 1.00 a device: set --config.mesh.fsdp to more devices.")
    assert examine(FLOAT32, "--config.mesh.fsdp=8")[0] == 0


def test_what_merely_slows_training_does_not_fail(monkeypatch, no_self_test):
    slow = inventory.Problem(False, "nothing is kept.")
    monkeypatch.setattr(inventory, "cache", lambda directory: ("not kept", slow))
    status, text, _ = examine()
    assert status == 0
    assert "  compiled programs not kept" in text
    assert "  note   nothing is kept." in text
    assert "  note   bfloat16 is less exact than float32 and rarely faster on a CPU: set --config.network.dtype" in text


def test_large_arrays_that_fail_are_a_report(monkeypatch, no_self_test):
    def fail(config):
        raise doctor.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(self_test, "rates", fail)
    status, text, _ = examine(FLOAT32)
    assert status == 1
    assert "fails (RESOURCE_EXHAUSTED: out of memory): end other programs" in text


def make_run(**fields):
    return runs.unsaved(configs.parse(configs.merge({name.replace("__", "."): of for name, of in fields.items()})), 27)


@pytest.mark.parametrize(
    ("platform", "fields", "why", "slow"),
    [
        ("gpu", {}, "cudnn: auto takes the fastest on a GPU in bfloat16", ""),
        ("tpu", {}, "splash: auto takes the fastest on a TPU in bfloat16", ""),
        ("gpu", {"network__dtype": "float32"}, "plain: auto takes cudnn in bfloat16 only", "network.dtype=bfloat16"),
        (
            "tpu",
            {"data__length": 1000},
            "plain: auto takes splash only for lengths divisible by 128",
            "data.length to a multiple of 128",
        ),
        (
            "gpu",
            {"network__attention": "plain"},
            "plain: config.network.attention asks for it",
            "network.attention=auto",
        ),
    ],
)
def test_attention_of_other_platforms(monkeypatch, platform, fields, why, slow):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    config = make_run(**fields).config
    chosen = attentions.resolve(config.network.attention, config.data.length, config.network.array_dtype)
    assert f"{chosen}: {doctor._why_attention(config, chosen)}" == why
    found = [problem.text for problem in doctor._slow(config, chosen)]
    assert len(found) == bool(slow)
    assert all(f"set --config.{slow}." in text for text in found)


@pytest.mark.parametrize(
    ("platform", "kind", "fields", "expected"),
    [
        ("cpu", "cpu", {}, "rolled: auto unrolls on a CPU only"),
        ("cpu", "cpu", {"network__remat": "none"}, "unrolled: auto unrolls on a CPU only"),
        ("tpu", "TPU v4", {}, "rolled: auto never unrolls on a TPU"),
        ("gpu", "NVIDIA H200", {"training__batch_size": 32}, "unrolled: auto unrolls where activations take less than"),
        ("gpu", "NVIDIA H200", {}, "rolled: auto unrolls where activations take less than half"),
        ("gpu", "NVIDIA H200", {"training__num_micro_batches": 16}, "unrolled: auto unrolls where"),
        ("gpu", "a new GPU", {}, "rolled: auto does not know this GPU's memory"),
        ("gpu", "NVIDIA H200", {"network__remat": "blocks"}, "rolled: auto never unrolls with config.network.remat"),
        ("gpu", "NVIDIA H200", {"network__layer_loop": "unrolled"}, "unrolled: config.network.layer_loop asks"),
    ],
)
def test_layer_loop_of_other_platforms(monkeypatch, platform, kind, fields, expected):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(sharding, "device_kind", lambda: kind)
    assert doctor._layer_loop(make_run(**fields)).startswith(expected)


def test_help_and_wrong_arguments(capsys):
    assert cli.main(["doctor", "--help"]) == 0
    assert "sedd doctor [--config=FILE]" in capsys.readouterr().out
    assert cli.main(["doctor", "--config.network.dtype=float16"]) == 1
    assert capsys.readouterr().err.startswith("sedd doctor: --config.network.dtype=float16 is unknown")
