"""The streamed score head equals the dense one in value and gradient, in one block or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import graphs, networks, score_heads, tiles

BATCH, LENGTH, WIDTH = 3, 12, 16
SIGMA = jnp.array([1e-3, 0.7, 6.0])


@pytest.fixture(
    scope="module", params=[(201, True), (201, False), (256, False)], ids=["scaled", "unscaled", "without padding"]
)
def head(request):
    """A config, random weights (padding included), features, and tokens."""
    num_states, scaled = request.param
    config = networks.NetworkConfig(num_states=num_states, hidden_size=WIDTH, scale_by_sigma=scaled, dtype="float32")
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "head_kernel": jax.random.normal(keys[0], (WIDTH, config.padded_states)),
        "head_bias": jax.random.normal(keys[1], (config.padded_states,)),
    }
    features = jax.random.normal(keys[2], (BATCH, LENGTH, WIDTH))
    xt = jax.random.randint(keys[3], (BATCH, LENGTH), 0, num_states)
    x0 = jax.random.randint(keys[4], (BATCH, LENGTH), 0, num_states).at[:, ::3].set(xt[:, ::3])
    return config, params, features, xt, x0


def value_and_gradients(summarize, params, features):
    """A summary, and the gradients of an arbitrary combination of it."""

    def combine(params, features):
        summary = summarize(params, features)
        weights = jax.random.normal(jax.random.key(9), (3, BATCH, LENGTH))
        return sum((w * x).sum() for w, x in zip(weights, summary, strict=True)), summary

    gradients, summary = jax.jit(jax.grad(combine, (0, 1), has_aux=True))(params, features)
    return summary, gradients


def dense(config, xt, x0, is_needed):
    """The same summary from the whole array."""

    def summarize(params, features):
        summary = graphs.summarize(score_heads.log_score(config, params, features, xt, SIGMA), xt, x0)
        return jax.tree.map(lambda x: jnp.where(is_needed, x, 0.0), summary)

    return summarize


@pytest.fixture
def small_tiles(monkeypatch):
    """Several chunks of positions and blocks of states, the last of both incomplete."""
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 5)
    monkeypatch.setattr(score_heads, "TILE_LOGITS", dict.fromkeys(score_heads.TILE_LOGITS, 1))


@pytest.mark.parametrize("needed", ["none", "one", "some", "all"])
@pytest.mark.parametrize("tiles", ["one tile", "many"])
def test_streamed_equals_dense(head, needed, tiles, request):
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    config, params, features, xt, x0 = head
    is_needed = {
        "none": jnp.zeros(xt.shape, bool),
        "one": jnp.zeros(xt.shape, bool).at[1, 7].set(True),
        "some": jax.random.bernoulli(jax.random.key(5), 0.4, xt.shape),
        "all": jnp.ones(xt.shape, bool),
    }[needed]
    streamed = lambda params, features: score_heads.summarize(config, params, features, xt, x0, SIGMA, is_needed)
    expected = value_and_gradients(dense(config, xt, x0, is_needed), params, features)
    ours = value_and_gradients(streamed, params, features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, expected)


def test_padding_never_leaks(head):
    """Neither value nor gradient depends on, or reaches, the padded part of the vocabulary."""
    config, params, features, xt, x0 = head
    n = config.num_states
    other = {name: x.at[..., n:].set(37.0) for name, x in params.items()}
    everywhere = jnp.ones(xt.shape, bool)
    streamed = lambda params, features: score_heads.summarize(config, params, features, xt, x0, SIGMA, everywhere)
    expected, ours = value_and_gradients(streamed, params, features), value_and_gradients(streamed, other, features)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert all(not gradient[..., n:].any() for gradient in ours[1][0].values())
    log_score = score_heads.log_score(config, params, features, xt, SIGMA)
    assert log_score.shape == (BATCH, LENGTH, n)
    np.testing.assert_array_equal(log_score, score_heads.log_score(config, other, features, xt, SIGMA))


def test_log_score_is_zero_at_the_current_token_and_scaled_elsewhere(head):
    config, params, features, xt, _ = head
    log_score = score_heads.log_score(config, params, features, xt, SIGMA)
    current = np.asarray(xt)[..., None] == np.arange(config.num_states)
    assert not np.asarray(log_score)[current].any()
    z = np.float64(features) @ np.float64(params["head_kernel"]) + np.float64(params["head_bias"])
    if config.scale_by_sigma:
        z -= np.log(np.expm1(np.float64(SIGMA)) * (config.num_states - 1))[:, None, None]
    np.testing.assert_allclose(log_score[~current], z[..., : config.num_states][~current], rtol=1e-5, atol=1e-4)


def test_logits_accumulate_in_float32_from_bfloat16():
    features, kernel = jnp.ones((1, 1, 1024), jnp.bfloat16), jnp.full((1024, 128), 1.0 + 2**-7)
    z = score_heads.logits({"head_kernel": kernel, "head_bias": jnp.zeros(128)}, features)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, 1024 + 8, rtol=1e-6)
