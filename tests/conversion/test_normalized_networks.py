"""Runs with `network.normalize` in PyTorch: the scores of JAX, samples of the softmax, and the same run back."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

omegaconf = pytest.importorskip("omegaconf", reason="OmegaConf is missing: pip install -e '.[test-all]'")
torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.conversion import convert, torch_model, torch_weights
from sedd_jax.data import tokenizers
from sedd_jax.model import networks, optimizers, score_heads, train_state
from tests.support import oracles, weights

GRAPHS = ("absorb", "uniform")
_SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "cond_dim": 16, "dtype": "float32"}


@pytest.fixture(scope="module", params=GRAPHS)
def run(request, tmp_path_factory):
    """A run directory of a small normalised network with random weights."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    config = configs.Config(
        data=configs.DataConfig(length=16, source=""),
        graph=configs.GraphConfig(name=request.param),
        network=networks.NetworkConfig(
            num_states=0, normalize=True, scale_by_sigma=request.param == "absorb", **_SIZES
        ),
    )
    made = runs.Run(workdir=workdir, config=config, tokenizer=tokenizers.build("text8", lambda: ()))
    drawn = torch_weights.to_torch(weights.drawn(made.network), made.network)
    params = torch_weights.from_torch(drawn, made.network)  # The padding of the vocabulary is 0, as in any run.
    opt_state = jax.jit(optimizers.make_optimizer(config.optimizer, 4).init)(params)
    state = train_state.TrainState(step=jnp.int32(7), params=params, ema_params=params, opt_state=opt_state)
    workdir.mkdir()
    return runs.fill(workdir, config, made.tokenizer, state)


@pytest.fixture(scope="module")
def written(run):
    """What `sedd convert` writes of the run for PyTorch."""
    directory = run.workdir.parent / "out"
    result = convert.convert(run.workdir, convert.Target(directory=directory), verify=True)
    assert result["to_format"] == "torch"
    return directory


@pytest.fixture(scope="module")
def in_transformers(written, tmp_path_factory):
    """The same in transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install -e '.[test-all]'")
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield transformers.AutoModel.from_pretrained(written, trust_remote_code=True)
    sys.path[:] = [path for path in sys.path if path != place]


def log_score_in_jax(run, xt, sigma):
    model = networks.Model(run.network, run.params("ema_params")[1])
    features = networks.apply(model, jnp.asarray(xt, jnp.int32), jnp.asarray(sigma))
    return np.asarray(score_heads.log_score(model, features, jnp.asarray(xt, jnp.int32), jnp.asarray(sigma)))


def test_scores_are_those_of_jax(run, written, in_transformers):
    xt = np.random.default_rng(0).integers(run.network.num_states, size=(4, 16))
    xt[:, ::2] = run.network.num_states - 1  # the mask of the absorbing graph
    sigma = np.float32([1e-3, 0.1, 1.0, 6.0])
    expected = log_score_in_jax(run, xt, sigma)
    for model in (torch_model.SEDD.from_pretrained(written), in_transformers):
        with torch.inference_mode():
            found = model(torch.from_numpy(xt), torch.from_numpy(sigma))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)
    if run.graph.has_mask:  # Scores out of the mask are a distribution over e^sigma - 1.
        total = np.exp(found[:, ::2].double().numpy())[..., :-1].sum(-1)
        np.testing.assert_allclose(total * np.expm1(sigma.astype(float))[:, None], 1, rtol=1e-4)


def test_the_run_comes_back_bit_for_bit(run, written, tmp_path):
    convert.convert(written, convert.Target(directory=tmp_path / "back"), verify=True)
    back = runs.load(tmp_path / "back")
    assert back.network == run.network
    assert (back.config.graph, back.config.noise, back.tokenizer) == (run.config.graph, run.config.noise, run.tokenizer)
    ours, theirs = (each.params("ema_params")[1] for each in (run, back))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_samples_follow_the_softmax(run, in_transformers):
    # Where the head sees no features, all tokens are independent, and their distribution is the softmax of the bias.
    # Then a few steps of this sampler are exact.
    head = in_transformers.output_layer.linear
    before = head.weight.data.clone()
    head.weight.data.zero_()
    try:
        tokens = in_transformers.sample(200, num_steps=4, seed=1).numpy()
    finally:
        head.weight.data.copy_(before)
    chances = head.bias.data[: run.graph.vocab_size].double().softmax(-1).numpy()
    counts = np.bincount(tokens.ravel(), minlength=run.graph.vocab_size)
    assert oracles.chi_square_p(counts, chances) > 1e-4


@pytest.mark.parametrize("sampler", torch_model.SAMPLERS)
def test_transformers_samples_what_torch_alone_does_and_keeps_given_tokens(run, written, in_transformers, sampler):
    given = torch.randint(run.graph.vocab_size, (3, 16), generator=torch.Generator().manual_seed(3))
    is_given = torch.arange(16).expand(3, 16) < 5
    alone = torch_model.SEDD.from_pretrained(written)
    found, expected = (
        model.sample(num_steps=3, sampler=sampler, given=given, is_given=is_given, seed=2)
        for model in (in_transformers, alone)
    )
    assert torch.equal(found, expected)
    assert torch.equal(found[:, :5], given[:, :5])
    assert in_transformers.decode(found) == [run.tokenizer.decode(row) for row in found.numpy()]


def test_the_published_program_refuses_it_and_card_and_config_say_so(run, written):
    config = json.loads((written / "config.json").read_text())
    assert config["graph"]["type"] not in GRAPHS  # Its get_graph knows these two.
    with pytest.raises(omegaconf.errors.ConfigAttributeError, match="Missing key scale_by_sigma"):
        _ = omegaconf.OmegaConf.create(config).model.scale_by_sigma  # Its network asks for it.
    assert "only torch_model.py and modeling_sedd.py of this directory" in config["sedd_jax"]["note"]
    card = (written / "README.md").read_text()
    assert "has no such network and refuses this directory" in card
    assert "published SEDD program also loads" not in card
