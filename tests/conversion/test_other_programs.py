"""Checkpoints of UDLM, Duo, BD3-LM and RADD: which become runs with the same outputs, and which are refused and why."""

import base64
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

import yaml

from sedd_jax import runs
from sedd_jax.conversion import convert, published_checkpoints, torch_model, torch_weights
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules
from sedd_jax.model import autoregression, networks, score_heads
from tests.support import foreign, places

GOLDEN = places.GOLDEN / "model_absorb_a"
TOKENS = np.random.default_rng(0).integers(26, size=(3, 24))


@pytest.fixture
def model():
    return torch_model.SEDD.from_pretrained(GOLDEN)


def read(source, weights="ema"):
    reader = published_checkpoints.find_reader(source)
    assert reader is not None
    return reader(source, weights)


def to_run(source, weights="ema"):
    """The run that a source becomes, and its network in float32."""
    model, _ = convert._read(source, weights, None, "")
    config = dataclasses.replace(model.run.network, dtype="float32", dropout=0.0)
    return model.run, networks.Model(config, torch_weights.from_torch(model.tensors, config))


def scaled(theirs):
    """A moving average of a network: parameters that are all 1.1 times as large."""
    return {"shadow_params": [1.1 * parameter.detach() for parameter in theirs.parameters()]}


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (foreign.duo_config("sedd"), ("absorb", True, False, True)),
        (foreign.duo_config("mdlm"), ("absorb", True, True, False)),
        (foreign.duo_config("duo_base"), ("uniform", False, True, True)),
        (foreign.duo_config("duo"), ("uniform", False, True, True)),
        (foreign.duo_config("distillation"), ("uniform", False, True, True)),
        (foreign.bd3lm_config("sedd"), ("absorb", True, False, True)),
        (foreign.bd3lm_config("mdlm", block_size=24), ("absorb", True, True, False)),
        (
            foreign.mdlm_config(diffusion="uniform", parameterization="d3pm", time_conditioning=True),
            ("uniform", False, True, True),
        ),
    ],
)
def test_what_the_output_of_a_network_is(tmp_path, model, config, expected, weights):
    found = read(foreign.write_lightning(tmp_path / "x.ckpt", model, config), weights)
    network = found.config.network
    assert (found.config.graph.name, network.scale_by_sigma, network.normalize, found.is_conditioned) == expected
    assert found.num_tokens == 26 + (expected[0] == "uniform")  # The absorbing graph's 27th state is the mask.
    assert (found.config.noise.name, found.config.noise.eps) == ("loglinear", 1e-3)
    assert (found.config.data.length, found.tokenizer, found.origin["step"]) == (24, "gpt2", 9)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found.tensors[name], parameter.detach() + (weights == "ema"), name)


def test_a_schedule_of_duo_has_its_own_end(tmp_path, model):
    config = foreign.duo_config("duo", noise={"eps": 1e-2})
    assert read(foreign.write_lightning(tmp_path / "x.ckpt", model, config)).config.noise.eps == 1e-2


@pytest.mark.parametrize(("config", "unused"), [(foreign.duo_config("duo"), 1), (foreign.duo_config("sedd"), 0)])
def test_a_uniform_checkpoint_keeps_the_id_that_its_program_appended_to_gpt2s(tmp_path, config, unused):
    """Duo pads with it, UDLM calls it the mask; noise draws it like any token. Absorbing models have the mask there."""
    described = json.loads((GOLDEN / "config.json").read_text()) | {"tokens": 257}
    source = foreign.write_lightning(tmp_path / "x.ckpt", torch_model.SEDD(described), config)
    ranks = tmp_path / "bytes.tiktoken"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    model, _ = convert._read(source, "raw", None, f"gpt2:{ranks}")
    assert (model.run.graph.num_states, model.run.tokenizer.num_unused) == (258, unused)
    assert model.run.tokenizer.decode(model.run.tokenizer.encode("text")) == "text"


@pytest.mark.slow
def test_bounds_of_a_uniform_checkpoint_are_duos_objective(tmp_path, model):
    found = read(foreign.write_lightning(tmp_path / "x.ckpt", model, foreign.duo_config("duo")), "raw")
    config = dataclasses.replace(found.config.network, num_states=27, dropout=0.0)
    ours = networks.Model(config, torch_weights.from_torch(found.tensors, config))
    process = forward.Process(graphs.Uniform(vocab_size=27), noise_schedules.LogLinear())
    x0, t = jnp.asarray(TOKENS), jnp.array([0.2, 0.5, 0.9])
    sigma = process.noise.sigma(t)
    xt = process.graph.sample_transition(jax.random.key(0), x0, sigma)

    def summary_fn(xt, x0, sigma):
        features = networks.apply(ours, xt, sigma)
        return score_heads.summarize(ours, features, xt, x0, sigma, process.graph.is_noise(xt))

    bounds = losses.bounds(summary_fn, process, x0, xt, t)
    # The objective of UDLM, equation 18, in terms of mixtures of the clean token's distribution with noise.
    alpha = np.exp(-np.asarray(sigma, np.float64))[:, None, None]
    with torch.inference_mode():
        z = model.output_layer.linear(model.features(torch.tensor(np.asarray(xt)).long(), torch.tensor(sigma)))
    mixed = lambda clean: 27 * alpha * clean + 1 - alpha
    true, predicted = mixed(np.eye(27)[TOKENS]), mixed(z.double().softmax(-1).numpy())
    at_xt = lambda mixture: np.take_along_axis(mixture, np.asarray(xt)[..., None], -1)
    ratio = true / at_xt(true)
    term = ratio * (np.log(ratio) - np.log(predicted / at_xt(predicted)))
    inner = 27 / at_xt(true)[..., 0] - 27 / at_xt(predicted)[..., 0] - term.sum(-1)
    expected = -0.999 / (27 * alpha[..., 0]) * inner
    np.testing.assert_allclose(bounds.score_entropy, expected.sum(-1), rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        foreign.duo_config("ar"),
        foreign.bd3lm_config("ar", block_size=1),
        foreign.mdlm_config(backbone="ar", parameterization="ar", noise={"type": "ar"}),
    ],
)
def test_an_autoregressive_checkpoint_predicts_the_same(tmp_path, config):
    """Its sequences begin with GPT-2's end of text, the last token, where ours begin with the mask."""
    theirs = foreign.Plain(is_causal=True)
    run, ours = to_run(foreign.write_lightning(tmp_path / "x.ckpt", theirs, config, ema=scaled(theirs)))
    assert (run.config.graph.name, run.config.data.length) == ("autoregressive", 23)
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter *= 1.1
        x = torch.from_numpy(np.concatenate([np.full((3, 1), 25), TOKENS[:, 1:]], axis=1))
        expected = theirs(x[:, :-1])[..., :26].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
    found = autoregression.log_likelihood(ours, jnp.asarray(TOKENS[:, 1:]), run.graph)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        foreign.mdlm_config(),
        foreign.mdlm_config(diffusion="uniform", parameterization="d3pm", time_conditioning=True),
        foreign.duo_config("sedd"),
        foreign.duo_config("duo"),
        foreign.bd3lm_config("mdlm", block_size=24),
    ],
    ids=["mdlm", "udlm", "sedd", "duo", "bd3lm"],
)
def test_a_checkpoint_goes_through_a_run_to_pytorch(tmp_path, model, config):
    """The scores in PyTorch are those that its own program's output stands for; every conversion proves itself."""
    source = foreign.write_lightning(tmp_path / "x.ckpt", model, config)
    convert.convert(source, convert.Target(directory=tmp_path / "run"), weights="raw")
    convert.convert(tmp_path / "run", convert.Target(directory=tmp_path / "out"))
    run, ours = to_run(source, "raw")
    xt, sigma = jnp.asarray(TOKENS, jnp.int32).at[:, ::3].set(run.graph.mask_id or 0), jnp.array([1e-3, 1.0, 6.0])
    is_conditioned = read(source, "raw").is_conditioned
    told = sigma if is_conditioned else jnp.zeros(3)
    expected = score_heads.log_score(ours, networks.apply(ours, xt, told), xt, sigma)
    theirs = torch_model.SEDD.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = theirs(torch.from_numpy(np.array(xt)).long(), torch.from_numpy(np.array(sigma)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if is_conditioned or not name.startswith("sigma_map"):
            np.testing.assert_array_equal(theirs.state_dict()[name], parameter.detach(), name)


@pytest.mark.slow
def test_an_autoregressive_checkpoint_becomes_a_verified_run(tmp_path):
    source = foreign.write_lightning(tmp_path / "x.ckpt", foreign.Plain(is_causal=True), foreign.duo_config("ar"))
    result = convert.convert(source, convert.Target(directory=tmp_path / "run"), weights="raw")
    assert 0 < result["largest_difference"] < 1e-4
    assert runs.load(tmp_path / "run").is_autoregressive


def write_radd(root, theirs, *, is_run):
    """A directory as RADD's program writes it."""
    if is_run:
        (root / ".hydra").mkdir(parents=True)
        (root / "checkpoints-meta").mkdir()
        (root / ".hydra" / "config.yaml").write_text(yaml.safe_dump(foreign.radd_config()))
        saved = {"model": theirs.state_dict(), "ema": scaled(theirs), "step": 7}
        torch.save(saved, root / "checkpoints-meta" / "checkpoint.pth")
    else:
        root.mkdir()
        (root / "config.json").write_text(json.dumps(foreign.radd_config()))
        torch.save(theirs.state_dict(), root / "pytorch_model.bin")
    return root


@pytest.mark.parametrize("layout", ["hub", "raw", "ema"])
def test_a_network_of_radd_predicts_the_same_at_every_noise_level(tmp_path, layout):
    theirs = foreign.Plain(is_biased=True)
    root = write_radd(tmp_path / "radd", theirs, is_run=layout != "hub")
    run, ours = to_run(root, "raw" if layout == "raw" else "ema")
    assert (run.config.graph.name, run.network.scale_by_sigma, run.network.normalize) == ("absorb", True, True)
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter *= 1.1 if layout == "ema" else 1.0
        expected = theirs(torch.from_numpy(TOKENS))
    features = networks.apply(ours, jnp.asarray(TOKENS), jnp.array([1e-3, 1.0, 6.0]))
    found = score_heads.logits(ours, features)[..., :27]
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("is_run", [True, False])
def test_a_network_of_radd_goes_through_a_run_to_pytorch(tmp_path, is_run):
    """The scores out of the mask in PyTorch are RADD's: its distribution of clean tokens over e^sigma - 1."""
    theirs = foreign.Plain(is_biased=True)
    root = write_radd(tmp_path / "radd", theirs, is_run=is_run)
    convert.convert(root, convert.Target(directory=tmp_path / "run"), weights="raw" if is_run else "ema")
    convert.convert(tmp_path / "run", convert.Target(directory=tmp_path / "out"))
    xt, sigma = torch.from_numpy(TOKENS).clone(), torch.tensor([1e-3, 1.0, 6.0])
    xt[:, ::3] = 26
    with torch.inference_mode():
        found = torch_model.SEDD.from_pretrained(tmp_path / "out")(xt, sigma)[:, ::3, :26]
        expected = theirs(xt)[:, ::3, :26].log_softmax(-1) - sigma.expm1().log()[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changed", "expected"),
    [
        ("udlm", {"cfg": False, "time_conditioning": True}, ("uniform", True, True)),
        ("DUO", {"causal": False}, ("uniform", True, True)),
        ("bd3lm", {"block_size": 24, "time_conditioning": True}, ("absorb", False, True)),
        ("bd3lm", {"block_size": 24, "time_conditioning": False}, ("absorb", True, False)),
    ],
)
def test_a_directory_for_transformers(tmp_path, model, kind, changed, expected):
    changed = {"cross_attn": False, "causal": False, "adaln": True} | changed
    (tmp_path / "config.json").write_text(json.dumps(foreign.transformers_config(kind, 27, **changed)))
    torch.save({f"backbone.{name}": x for name, x in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    found = read(tmp_path)
    assert (found.config.graph.name, found.config.network.normalize, found.is_conditioned) == expected


def test_an_autoregressive_directory_for_transformers(tmp_path):
    changed = {"block_size": 1, "cross_attn": False, "causal": True, "adaln": False}
    (tmp_path / "config.json").write_text(json.dumps(foreign.transformers_config("bd3lm", 27, **changed)))
    state = {f"backbone.{name}": x for name, x in foreign.Plain().state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = read(tmp_path)
    assert (found.config.graph.name, found.start_id, found.config.data.length) == ("autoregressive", 25, 23)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (foreign.duo_config("d3pm"), "of Duo, but has algo.name='d3pm', whose network may predict the mask as a clean"),
        (foreign.duo_config("duo", algo={"backbone": "unet"}), "of Duo, but has algo.backbone='unet', another archit"),
        (foreign.duo_config("duo", algo={"backbone": "hf_dit"}), "a copy of a model of the Hub, so convert that one"),
        (foreign.duo_config("duo", noise={"type": "cosine"}), "of Duo, but has noise.type='cosine': only 'log-linear'"),
        (foreign.bd3lm_config("bd3lm"), "of BD3-LM, but has algo.name='bd3lm', whose blocks attend to noised and to"),
        (foreign.bd3lm_config("sedd", algo={"cross_attn": True}), "BD3-LM, but has algo.cross_attn=True: only False"),
        (
            foreign.bd3lm_config("sedd", block_size=8),
            "of BD3-LM, but has block_size=8: only blocks of the whole length, 24",
        ),
        (foreign.bd3lm_config("sedd", noise={"type": "log"}), "config.noise.name=log is unknown"),
    ],
)
def test_networks_that_ours_cannot_express_are_refused(tmp_path, model, config, message):
    with pytest.raises(ValueError, match=message):
        read(foreign.write_lightning(tmp_path / "x.ckpt", model, config))


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("udlm", {"cfg": True}, "of UDLM, but has cfg=True: only False can be converted"),
        ("duo", {"causal": True}, "of Duo, but has causal=True"),
        ("bd3lm", {"cross_attn": True}, "of BD3-LM, but has cross_attn=True"),
        ("bd3lm", {"cross_attn": False, "causal": False, "adaln": True, "block_size": 4}, "has block_size=4"),
    ],
)
def test_directories_that_ours_cannot_express_are_refused(tmp_path, kind, changed, message):
    (tmp_path / "config.json").write_text(json.dumps(foreign.transformers_config(kind, 27, **changed)))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("is_run", [True, False])
def test_a_network_that_is_told_the_time_is_refused(tmp_path, is_run):
    """GIDD's, in a directory of its program and in one for transformers."""
    if is_run:
        (tmp_path / "config.yaml").write_text("model: {type: diffusion}")
        torch.save({}, tmp_path / "noise_schedule.pt")
        torch.save({}, tmp_path / "model.pt")
    else:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "dit", "p_uniform": 0.1, "vocab_size": 27}))
        torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="of GIDD, whose network is told the time instead of the noise level"):
        read(tmp_path)


def test_class_labels_are_refused(tmp_path, model):
    """UDLM's classifier-free guidance adds an embedding of labels to that of the noise level."""
    config = foreign.mdlm_config(diffusion="uniform", parameterization="d3pm", training={"guidance": {"dropout": 0.1}})
    with pytest.raises(ValueError, match=r"of UDLM, but has training.guidance=a dict: only networks without"):
        read(foreign.write_lightning(tmp_path / "x.ckpt", model, config))


def test_an_autoregressive_checkpoint_of_an_unknown_start_is_refused(tmp_path):
    config = foreign.duo_config("ar", data={"tokenizer_name_or_path": "text8"})
    source = foreign.write_lightning(tmp_path / "x.ckpt", foreign.Plain(), config)
    with pytest.raises(ValueError, match="with the tokenizer text8, whose first token is unknown: only gpt2 or bert"):
        read(source)
