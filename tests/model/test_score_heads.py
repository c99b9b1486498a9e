"""The streamed score head equals the dense one in value and gradient, in one block or several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import scores
from sedd_jax.model import networks, score_heads, tiles
from sedd_jax.runtime import sharding
from tests.support import slow

BATCH, LENGTH, WIDTH = 3, 12, 16
SIGMA = jnp.array([1e-3, 0.7, 6.0])


# Number of states, whether scores are scaled, whether they are normalised.
HEADS = {
    "scaled": (201, True, False),
    "unscaled": (201, False, False),
    "without padding": (256, False, False),
    "normalised": (201, True, True),
    "uniform, normalised": (201, False, True),
}


@pytest.fixture(scope="module", params=slow.all_but(["scaled", "normalised", "uniform, normalised"], HEADS))
def head(request):
    """A network's head with random weights (padding included), features, and tokens."""
    num_states, scaled, normalized = HEADS[request.param]
    config = networks.NetworkConfig(
        num_states=num_states, hidden_size=WIDTH, scale_by_sigma=scaled, normalize=normalized, dtype="float32"
    )
    params, features, xt, x0 = drawn(config, BATCH)
    x0[:, ::3] = xt[:, ::3]
    return networks.Model(config, params), features, jnp.asarray(xt), jnp.asarray(x0)


def drawn(config, batch):
    """Weights of a head, features of some sequences, and two texts of them."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"head_kernel": normal(WIDTH, config.padded_states), "head_bias": normal(config.padded_states)}
    return params, normal(batch, LENGTH, WIDTH), *rng.integers(0, config.num_states, (2, batch, LENGTH), np.int32)


def value_and_gradients(summarize):
    """(model, features) -> a summary, and the gradients of an arbitrary combination of it in both."""
    gradients = jax.jit(with_gradients(summarize))
    return lambda model, features: of(gradients(model, features))


def with_gradients(summarize):
    """(model, features, ...) -> the gradients in model and features, and the summary."""

    def combine(model, features, *rest):
        summary = summarize(model, features, *rest)
        weights = np.random.default_rng(9).normal(size=(3, BATCH, LENGTH)).astype(np.float32)
        return sum((w * x).sum() for w, x in zip(weights, summary, strict=True)), summary

    return jax.grad(combine, (0, 1), has_aux=True)


def of(found):
    (of_model, of_features), summary = found
    return summary, (of_model.params, of_features)


@functools.cache
def compiled(is_streamed, tiles):
    """(model, features, xt, x0, is_needed) -> gradients and summary, compiled once for all that share its tiles."""
    if is_streamed:
        return jax.jit(
            with_gradients(
                lambda model, features, xt, x0, is_needed: score_heads.summarize(
                    model, features, xt, x0, SIGMA, is_needed
                )
            )
        )
    return jax.jit(with_gradients(lambda model, features, xt, x0, is_needed: dense(xt, x0, is_needed)(model, features)))


def dense(xt, x0, is_needed):
    """The same summary from the whole array."""

    def summarize(model, features):
        summary = scores.summarize(score_heads.log_score(model, features, xt, SIGMA), xt, x0)
        return jax.tree.map(lambda x: jnp.where(is_needed, x, 0.0), summary)

    return summarize


@pytest.fixture
def small_tiles(monkeypatch):
    """Several chunks of positions and blocks of states, the last of both incomplete."""
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 5)
    monkeypatch.setattr(score_heads, "TILE_LOGITS", dict.fromkeys(score_heads.TILE_LOGITS, 1))


@pytest.mark.parametrize("needed", slow.all_but(["some"], ["none", "one", "some", "all"]))
@pytest.mark.parametrize("tiles", slow.all_but(["many"], ["one tile", "many"]))
def test_streamed_equals_dense(head, needed, tiles, request):
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    model, features, xt, x0 = head
    is_needed = {
        "none": np.zeros(xt.shape, bool),
        "one": np.arange(xt.size).reshape(xt.shape) == LENGTH + 7,
        "some": np.random.default_rng(5).random(xt.shape) < 0.4,
        "all": np.ones(xt.shape, bool),
    }[needed]
    is_needed = jnp.asarray(is_needed)
    ours, expected = (of(compiled(one, tiles)(model, features, xt, x0, is_needed)) for one in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, expected)


def test_bfloat16_streams_what_bfloat16_computes_whole(head, small_tiles):
    """Logits of bfloat16 products, accumulated and summed in float32; only the sums' order differs."""
    model, features, xt, x0 = head
    features, is_needed = features.astype(jnp.bfloat16), jnp.ones(xt.shape, bool)
    streamed = lambda model, features: score_heads.summarize(model, features, xt, x0, SIGMA, is_needed)
    expected, expected_gradients = value_and_gradients(dense(xt, x0, is_needed))(model, features)
    ours, gradients = value_and_gradients(streamed)(model, features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), ours, expected)
    # The gradient of the logits is rounded to bfloat16 before its products, at other places in the two.
    assert gradients[1].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


@pytest.mark.parametrize("shape", slow.all_but(["2x2x2"], ["8x1x1", "1x8x1", "2x2x2"]))
@pytest.mark.parametrize("batch", slow.all_but([8], [8, BATCH]), ids=["divided", "whole"])
@pytest.mark.parametrize("means", ["scores", "uniform, normalised"])
def test_sharded_equals_unsharded(shape, batch, means):
    _, scaled, normalized = HEADS.get(means, HEADS["scaled"])
    config = networks.NetworkConfig(
        num_states=201, hidden_size=WIDTH, scale_by_sigma=scaled, normalize=normalized, dtype="float32"
    )
    params, features, xt, x0 = drawn(config, batch)
    xt, x0, is_needed = (jnp.asarray(x) for x in (xt, x0, np.random.default_rng(5).random(xt.shape) < 0.4))
    sigma = jnp.linspace(0.1, 3, batch)

    # A new function each time: JAX would remember what it traced without a mesh.
    def make_gradient_fn():
        def combine(params, features):
            summary = score_heads.summarize(networks.Model(config, params), features, xt, x0, sigma, is_needed)
            return sum(jnp.square(x).sum() for x in summary)

        return jax.jit(jax.value_and_grad(combine, (0, 1)))

    alone = make_gradient_fn()(params, features)
    data, fsdp, tensor = map(int, shape.split("x"))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, sharding.tree_shardings(mesh, params))
        together = make_gradient_fn()(split, features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), together, alone)


@pytest.mark.parametrize("normalize", slow.all_but([True], [False, True]), ids=["plain", "uniform, normalised"])
def test_memory_does_not_grow_with_length_times_vocabulary(normalize):
    """Temporary bytes of value and gradient are those of the head's and the features' own gradients."""

    def temporary_bytes(num_states: int, length: int) -> int:
        config = networks.NetworkConfig(
            num_states=num_states, hidden_size=WIDTH, scale_by_sigma=False, normalize=normalize, dtype="float32"
        )
        shapes = [(WIDTH, config.padded_states), (config.padded_states,), (1, length, WIDTH)]
        kernel, bias, features = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(kernel, bias, features, xt):
            model = networks.Model(config, {"head_kernel": kernel, "head_bias": bias})
            sigma, is_needed = jnp.ones(1), jnp.ones(xt.shape, bool)
            found = score_heads.summarize(model, features, xt, xt, sigma, is_needed)
            return found.logsumexp.sum() + found.mean.sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(kernel, bias, features, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = temporary_bytes(2_048, 512)
    for num_states, length in ((32_768, 512), (2_048, 8_192), (32_768, 8_192)):
        weights_and_features = 4 * (WIDTH + 1) * (num_states + length)
        assert temporary_bytes(num_states, length) < least + 8 * weights_and_features < num_states * length * 4


def test_padding_never_leaks(head):
    """Neither value nor gradient depends on, or reaches, the padded part of the vocabulary."""
    model, features, xt, x0 = head
    n = model.config.num_states
    past = np.arange(model.config.padded_states) >= n
    filled = {name: jnp.asarray(np.where(past, np.float32(37), x)) for name, x in model.params.items()}
    other = model.replace(params=filled)
    everywhere = jnp.ones(xt.shape, bool)
    streamed = lambda model, features: score_heads.summarize(model, features, xt, x0, SIGMA, everywhere)
    found = value_and_gradients(streamed)
    expected, ours = found(model, features), found(other, features)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert all(not np.asarray(gradient)[..., n:].any() for gradient in ours[1][0].values())
    log_score = score_heads.log_score(model, features, xt, SIGMA)
    assert log_score.shape == (BATCH, LENGTH, n)
    np.testing.assert_array_equal(log_score, score_heads.log_score(other, features, xt, SIGMA))


def test_log_score_is_zero_at_the_current_token_and_scaled_elsewhere(head):
    model, features, xt, _ = head
    config, params = model.config, model.params
    log_score = score_heads.log_score(model, features, xt, SIGMA)
    current = np.asarray(xt)[..., None] == np.arange(config.num_states)
    assert not np.asarray(log_score)[current].any()
    z = np.float64(features) @ np.float64(params["head_kernel"]) + np.float64(params["head_bias"])
    if config.mixes_uniformly:
        r = np.exp(z[..., : config.num_states] - z[..., : config.num_states].max(-1, keepdims=True))
        stays = np.exp(-np.float64(SIGMA))[:, None, None]
        mixture = config.num_states * stays * r / r.sum(-1, keepdims=True) + 1 - stays
        z = np.log(mixture / np.take_along_axis(mixture, np.asarray(xt)[..., None], -1))
    if config.scale_by_sigma:
        others = np.where(current, -np.inf, z[..., : config.num_states])
        total = np.exp(others).sum(-1, keepdims=True) if config.normalize else config.num_states - 1
        z -= np.log(np.expm1(np.float64(SIGMA))[:, None, None] * total)
    np.testing.assert_allclose(log_score[~current], z[..., : config.num_states][~current], rtol=1e-5, atol=1e-4)


def test_logits_accumulate_in_float32_from_bfloat16():
    features, kernel = jnp.ones((1, 1, 1024), jnp.bfloat16), jnp.full((1024, 128), 1.0 + 2**-7)
    z = score_heads.logits(
        networks.Model(networks.NetworkConfig(num_states=128), {"head_kernel": kernel, "head_bias": jnp.zeros(128)}),
        features,
    )
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, 1024 + 8, rtol=1e-6)
