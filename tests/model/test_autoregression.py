"""The baseline predicts tokens from those before alone, trains, is measured exactly, and samples what it predicts."""

import contextlib
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from sedd_jax.cli import main as cli
from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.evaluation import perplexity
from sedd_jax.model import autoregression, controls, networks, score_heads
from sedd_jax.reverse import samplers, steps
from sedd_jax.sampling import draws
from tests.support import oracles, weights

GRAPH = graphs.Absorbing(vocab_size=3, mask_id=3)
PROCESS = forward.Process(GRAPH, noise_schedules.LogLinear())
SAMPLER = autoregression.LeftToRight(length=4)
CONFIG = networks.NetworkConfig(
    num_states=4, hidden_size=16, num_layers=2, num_heads=2, scale_by_sigma=False, dtype="float32", causal=True
)


@pytest.fixture(scope="module")
def model():
    """A network of whose parameters none is 0, so that everything matters."""
    return networks.Model(CONFIG, weights.drawn(CONFIG))


@pytest.fixture(scope="module")
def log_likelihood():
    return jax.jit(lambda model, x: autoregression.log_likelihood(model, x, GRAPH))


SEQUENCES = jnp.asarray(list(itertools.product(range(3), repeat=4)), jnp.int32)


def test_probabilities_of_all_sequences_add_up_to_one(model, log_likelihood):
    found = np.asarray(log_likelihood(model, SEQUENCES))
    assert np.exp(found.sum(-1)).sum() == pytest.approx(1, abs=1e-5)
    assert found.std() > 0.1


def test_a_token_depends_on_those_before_alone(model, log_likelihood):
    found = np.asarray(log_likelihood(model, SEQUENCES)).reshape(3, 3, 3, 3, 4)
    for position in range(4):
        later = tuple(range(position + 1, 4))
        assert np.ptp(found[..., position], axis=later).max(initial=0) < 1e-6 if later else True
        earlier = tuple(range(position))
        assert not earlier or np.ptp(found[..., position], axis=earlier).max() > 1e-2


def test_likelihood_is_the_softmax_over_tokens_without_the_mask(model, log_likelihood):
    x = np.asarray(SEQUENCES)
    inputs = jnp.asarray(np.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=3))
    logits = jax.jit(lambda model: score_heads.logits(model, networks.apply(model, inputs, jnp.zeros(len(x)))))
    z = np.asarray(logits(model))[..., :3]
    expected = np.take_along_axis(z - scipy.special.logsumexp(z, -1, keepdims=True), x[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_likelihood(model, SEQUENCES), expected, atol=1e-5)


def _draw(model, key, given):
    own = draws.NetworkDraws(model, GRAPH, given, None, controls.Control(), "precise")
    return oracles.sample(key, SAMPLER, own.draws, PROCESS, given, SAMPLER.num_steps(9, 2))


def test_samples_follow_the_likelihood_and_keep_what_is_given(model, log_likelihood):
    assert isinstance(SAMPLER, samplers.Sampler)
    num = 5_000
    nothing = steps.Given(jnp.zeros((num, 4), jnp.int32), jnp.zeros((num, 4), bool))
    draw = jax.jit(_draw)
    distribution = np.exp(np.asarray(log_likelihood(model, SEQUENCES).sum(-1), np.float64))
    codes = np.asarray(draw(model, jax.random.key(2), nothing)) @ [27, 9, 3, 1]
    assert oracles.chi_square_p(np.bincount(codes, minlength=81), distribution / distribution.sum()) > 1e-3
    first = steps.Given(jnp.full((num, 4), 2, jnp.int32), jnp.broadcast_to(jnp.arange(4) < 2, (num, 4)))
    drawn = np.asarray(draw(model, jax.random.key(3), first))
    assert (drawn[:, :2] == 2).all()
    given = distribution.reshape(3, 3, 9)[2, 2]
    assert oracles.chi_square_p(np.bincount(drawn[:, 2:] @ [3, 1], minlength=9), given / given.sum()) > 1e-3


def _call(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*argv])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_a_run_trains_is_measured_exactly_and_continues_text(tmp_path):
    """On a text whose every second character follows from the one before."""
    random = np.random.default_rng(0)
    for split, size in (("train", 4000), ("valid", 400), ("test", 400)):
        (tmp_path / f"{split}.txt").write_text(
            "".join(letter + letter.upper() for letter in random.choice(list("abcd"), size))
        )
    settings = {
        "data.source": f"text:{tmp_path}/{{split}}.txt",
        "data.length": 16,
        "graph.name": "autoregressive",
        "network.hidden_size": 32,
        "network.num_heads": 2,
        "network.num_layers": 1,
        "network.dropout": 0.0,
        "network.dtype": "float32",
        "network.scale_by_sigma": False,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 10,
        "optimizer.ema_decay": 0.95,
        "training.num_steps": 75,
        "training.batch_size": 32,
        "training.eval_every": 75,
        "training.sample_every": 75,
        "sampling.num_samples": 2,
    }
    run = tmp_path / "run"
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    status, printed, error = _call("train", f"--workdir={run}", "--num_processes=1", "--json", *flags)
    assert status == 0, error
    bits = json.loads(printed.splitlines()[-1])["valid/negative_log_likelihood_bits"]
    # Two bits for every second character, nothing for the others; the first of a sequence may be either.
    assert 0.98 < bits < 1.25
    assert "held out: negative log likelihood bits" in error
    result = perplexity.evaluate(run, split="test")
    assert (result["protocol"], result["num_times"]) == ("exact", 1)
    assert result["negative_log_likelihood"]["bits_per_character"] == pytest.approx(bits, abs=0.08)
    assert result["negative_log_likelihood"]["nats_per_token_stderr"] == 0
    assert "exact" in str(perplexity.table(result))
    again = perplexity.evaluate(
        run, split="test", settings=perplexity.Settings(protocol="strict", seed=7, batch_size=5)
    )
    assert again["protocol"] == "exact"
    assert again["negative_log_likelihood"]["nats_per_token"] == pytest.approx(
        result["negative_log_likelihood"]["nats_per_token"], rel=1e-5
    )
    sample = ("sample", f"--workdir={run}", "--num_processes=1", "--json")
    status, printed, error = _call(*sample, "--prefix=aAbBc")
    assert status == 0, error
    for drawn in json.loads(printed.splitlines()[-1]):
        assert drawn["text"].startswith("aAbBc")
        assert (drawn["sampler"], drawn["nfe"]) == ("autoregressive", 16)
        pairs = [drawn["text"][place : place + 2] for place in range(0, 16, 2)]
        assert sum(pair[0].upper() == pair[1] for pair in pairs) >= 6
    status, _, error = _call(*sample, "--template=a{3}B")
    assert status == 1
    assert "sees no text after a gap" in error
    status, _, error = _call("convert", f"--from={run}", f"--to={tmp_path / 'torch'}")
    assert status == 1
    assert "is an autoregressive run" in error
