"""Readers of other programs' checkpoints: every layout gives the right weights, and damaged files are named."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

import yaml

from sedd_jax import runs
from sedd_jax.conversion import published_checkpoints, torch_model, torch_weights
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules
from sedd_jax.model import networks, score_heads
from tests.support import foreign, goldens, hub_emulator, places

GOLDEN = places.GOLDEN / "model_absorb_a"


@pytest.fixture
def model():
    return torch_model.SEDD.from_pretrained(GOLDEN)


@pytest.fixture
def training(tmp_path, model):
    """A run directory of the published program."""
    root = tmp_path / "exp"
    for directory in (".hydra", "checkpoints-meta", "checkpoints"):
        (root / directory).mkdir(parents=True)
    config = goldens.load("model_absorb_a/config.json") | {"hydra_only": "${model.length}"}
    text = yaml.safe_dump(config).replace("0.0001", "1e-4")
    assert yaml.safe_load(text)["noise"]["sigma_min"] == "1e-4"  # YAML 1.1 reads it as text, OmegaConf as a number.
    (root / ".hydra" / "config.yaml").write_text(text)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 24, dtype=torch.int64), torch.ones(1)).sum().backward()
    optimizer.step()
    saved = {
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "ema": foreign.average(model),
        "step": 11,
    }
    torch.save(saved, root / "checkpoints-meta" / "checkpoint.pth")
    torch.save(saved | {"step": 5}, root / "checkpoints" / "checkpoint_1.pth")
    return root


def read(source, weights="ema"):
    reader = published_checkpoints.find_reader(source)
    assert reader is not None
    return reader(source, weights)


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("file", ["", "checkpoints-meta/checkpoint.pth", "checkpoints/checkpoint_1.pth"])
def test_a_run_of_the_published_program(training, model, weights, file):
    found = read(training / file, weights)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found.tensors[name], parameter.detach() + (weights == "ema"), name)
    assert found.origin["step"] == (5 if "_1" in file else 11)
    assert found.config.noise.sigma_min == 1e-4
    assert found.config.optimizer.learning_rate == 3e-4
    assert (found.num_tokens, found.config.data.length, found.is_conditioned) == (26, 24, True)


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("parameterization", ["sedd", "subs"])
def test_a_checkpoint_of_mdlm(tmp_path, model, weights, parameterization):
    config = foreign.mdlm_config(parameterization=parameterization, time_conditioning=parameterization == "sedd")
    found = read(foreign.write_lightning(tmp_path / "x.ckpt", model, config), weights)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found.tensors[name], parameter.detach() + (weights == "ema"), name)
    assert found.config.network.normalize == (parameterization == "subs")
    assert found.config.network.scale_by_sigma
    assert found.is_conditioned == (parameterization == "sedd")
    assert (found.num_tokens, found.tokenizer, found.origin["step"]) == (26, "gpt2", 9)
    training = found.config.training
    assert (training.batch_size, training.num_steps, found.config.optimizer.learning_rate) == (512, 1000, 1e-3)


def test_a_directory_of_mdlm(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(foreign.transformers_config("mdlm", 27)))
    state = {f"backbone.{name}": x for name, x in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = read(tmp_path)
    assert found.config.network.normalize
    assert not found.is_conditioned
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found.tensors[name], parameter.detach(), name)


@pytest.mark.slow
def test_mdlm_predicts_the_distribution_of_x0(tmp_path, model):
    """Bounds of a converted network equal MDLM's objective: -log softmax(z without the mask)[x0] / t at each mask."""
    found = read(foreign.write_lightning(tmp_path / "x.ckpt", model, foreign.mdlm_config()), "raw")
    network = found.config.network
    network = networks.NetworkConfig(
        **{**network.__dict__, "num_states": 27, "dropout": 0.0, "dtype": "float32"},
    )
    params = torch_weights.from_torch(torch_weights.without_noise(found.tensors), network)
    graph = graphs.Absorbing(vocab_size=26, mask_id=26)
    x0 = np.random.default_rng(0).integers(26, size=(3, 24))
    t = np.float32([0.2, 0.5, 0.9])
    sigma = noise_schedules.LogLinear().sigma(jnp.asarray(t))
    xt = np.asarray(graph.sample_transition(jax.random.key(0), jnp.asarray(x0), sigma))

    def summary_fn(xt, x0, sigma):
        features = networks.apply(networks.Model(network, params), xt, sigma)
        return score_heads.summarize(networks.Model(network, params), features, xt, x0, sigma, graph.is_noise(xt))

    bounds = losses.bounds(
        summary_fn,
        forward.Process(graph, noise_schedules.LogLinear()),
        jnp.asarray(x0),
        jnp.asarray(xt),
        jnp.asarray(t),
    )
    with torch.inference_mode():
        z = model.output_layer.linear(model.features(torch.tensor(xt).long(), torch.zeros(3)))[..., :26].double()
        surprise = -z.log_softmax(-1).gather(-1, torch.from_numpy(x0)[..., None])[..., 0].numpy()
    expected = (np.where(xt == 26, surprise, 0) / t[:, None]).sum(-1)
    np.testing.assert_allclose(bounds.score_entropy, expected, rtol=1e-5)
    np.testing.assert_allclose(bounds.cross_entropy, expected, rtol=1e-5)


def test_a_network_without_noise_treats_every_noise_level_as_zero(model):
    config, _, _ = goldens.model("absorb_a")
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    params = torch_weights.from_torch(torch_weights.without_noise(tensors), config)
    xt = np.random.default_rng(1).integers(27, size=(3, 24))
    ours = networks.apply(networks.Model(config, params), jnp.asarray(xt, jnp.int32), jnp.array([1e-3, 1.0, 6.0]))
    with torch.inference_mode():
        np.testing.assert_allclose(ours, model.features(torch.from_numpy(xt), torch.zeros(3)), atol=5e-6, rtol=1e-5)


def change(path, **changed):
    saved = torch.load(path, weights_only=True)
    torch.save({name: x for name, x in (saved | changed).items() if x is not None}, path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ema": None}, "has no 'ema', only 'optimizer', 'model', 'step'"),
        ({"ema": {"decay": 0.9}}, "has no 'shadow_params'"),
        ({"ema": {"shadow_params": [torch.ones(2)]}}, "a moving average of 1 tensors for 30 parameters"),
        ({"ema": {"shadow_params": 3}}, "a moving average of int tensors"),
        ({"ema": {"shadow_params": ["x"] * 30}}, "holds no state_dict"),
        ({"ema": {"shadow_params": [torch.ones(2)] * 30}}, r"has shape \(2,\), but the config implies"),
        ({"model": {"a": torch.ones(1)}}, r"unknown \['a'\]"),
        ({"model": [1]}, "holds no state_dict"),
        ({"step": "many"}, "step='many'"),
    ],
)
def test_damaged_runs_are_named(training, changed, message):
    path = training / "checkpoints-meta" / "checkpoint.pth"
    change(path, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        read(training)
    assert str(training) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not YAML"),
        ("[1]", "holds a list where a mapping should be"),
        ("tokens: 26", "has no model.length"),
        ("tokens: many", "has tokens='many'"),
    ],
)
def test_broken_hydra_configs_are_named(training, text, message):
    (training / ".hydra" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(training)


def test_a_file_without_its_config_is_named(training):
    shutil.rmtree(training / ".hydra")
    with pytest.raises(ValueError, match=r"\.hydra/config.yaml is missing"):
        read(training / "checkpoints" / "checkpoint_1.pth")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"parameterization": "d3pm"},
            "MDLM, but has parameterization='d3pm', whose network .*: only 'sedd' or 'subs' or 'ar' can be converted",
        ),
        ({"backbone": "dimamba"}, "has backbone='dimamba'"),
        ({"diffusion": "uniform"}, "of UDLM, but has parameterization='subs': only 'd3pm' can be converted"),
        ({"diffusion": "gaussian"}, "of MDLM, but has diffusion='gaussian'"),
        ({"time_conditioning": "yes"}, "has time_conditioning='yes'"),
        ({"noise": {"type": "cosine"}}, "config.noise.name=cosine is unknown"),
        ({"model": {"n_blocks": 3}}, r"missing \['blocks.2"),
        ({"model": {"hidden_size": "${nothing}"}}, "config.network.hidden_size='\\${nothing}' must be of type int"),
    ],
)
def test_other_models_of_mdlm_are_refused(tmp_path, model, changed, message):
    source = foreign.write_lightning(tmp_path / "x.ckpt", model, foreign.mdlm_config(**changed))
    with pytest.raises(ValueError, match=message):
        read(source, "raw")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hyper_parameters": {}}, "has no 'config'"),
        ({"hyper_parameters": {"config": 3}}, "holds a int where a mapping should be"),
        ({"state_dict": {"x": torch.ones(1)}}, "has no 'vocab_embed.embedding'"),
    ],
)
def test_other_lightning_checkpoints_are_refused(tmp_path, model, changed, message):
    source = foreign.write_lightning(tmp_path / "x.ckpt", model, foreign.mdlm_config(), **changed)
    with pytest.raises(ValueError, match=message):
        read(source, "raw")


def test_one_set_of_weights_is_not_raw():
    with pytest.raises(ValueError, match=r"weights=raw is not in .*: give weights=ema"):
        read(GOLDEN, "raw")


@pytest.fixture
def hub(tmp_path):
    """A function that runs `sedd convert` with a Hub of one model on loopback."""
    with hub_emulator.Server({"hf_token": {"owner"}}) as server:
        model = hub_emulator.Repository(is_private=False)
        model.files = {path.name: path.read_bytes() for path in GOLDEN.iterdir()} | {"notes.txt": b"not needed"}
        server.repositories["owner/name"] = model

        def convert(name):
            command = [sys.executable, "-m", "sedd_jax", "convert", f"--from={name}", f"--to={tmp_path / 'run'}"]
            environment = os.environ | server.environment(str(tmp_path / "hub"))
            return subprocess.run(command, capture_output=True, text=True, env=environment)

        yield convert


@pytest.mark.slow
def test_a_model_of_the_hub(hub, tmp_path):
    done = hub("owner/name")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert runs.load(tmp_path / "run").graph.num_states == 27
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["from"] == "owner/name"
    files = {path.name for path in (tmp_path / "hub").rglob("snapshots/*/*")}
    assert files == {"config.json", "model.safetensors"}


def test_a_model_that_the_hub_does_not_have(hub, tmp_path):
    done = hub("owner/other")
    assert done.returncode == 1
    assert "owner/other is not a local path, and the download from the Hub failed" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("louaaron/sedd-small", True), ("a/b.c", True), ("a", False), ("a/b/c", False), ("./a", False), ("../a", False)],
)
def test_names_of_the_hub(name, expected):
    assert published_checkpoints.is_hub_name(name) == expected
