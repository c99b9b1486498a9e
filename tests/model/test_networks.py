"""The network: recorded activations and scores, and what must not change its values."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.model import attentions, layers, networks, score_heads
from tests.support import goldens, slow

TINY = networks.NetworkConfig(
    num_states=30, hidden_size=32, num_layers=3, num_heads=2, cond_dim=16, dropout=0.0, dtype="float32"
)


@functools.cache
def recorded_activations(name: str) -> dict[str, jax.Array]:
    """Ours for every activation recorded of one network, by the names there."""
    config, _, params = goldens.model(name)
    arrays = goldens.load(f"model_{name}_io.npz")

    @jax.jit
    def compute(xt, sigma):
        x = params["embedding"][xt]
        embedded = networks.SigmaEmbedding(config.cond_dim).apply({"params": params["sigma_embedding"]}, sigma)
        activations = {"act.vocab_embed": x, "act.sigma_map": embedded}
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            if i == 0:
                activations["act.blocks.0.norm1"] = layers.modulated_norm(
                    x, layer["attention_norm"], *(jnp.zeros((len(x), 1, x.shape[-1])),) * 2
                )
            block = networks.Block(config)
            (x, _), captured = block.apply({"params": layer}, x, nn.silu(embedded), None, capture_intermediates=True)
            activations[f"act.blocks.{i}"] = x
            if i == 0:
                parts = {
                    part: calls["__call__"][0]
                    for part, calls in captured["intermediates"].items()
                    if part != "__call__"
                }
        published = {"modulation": "adaLN_modulation", "qkv": "attn_qkv", "attention_out": "attn_out", "mlp_out": "mlp"}
        activations |= {f"act.blocks.0.{theirs}": parts[ours] for ours, theirs in published.items()}
        activations["act.blocks.0.attention"] = attentions.attend(parts["qkv"], config.num_heads, "plain")
        features = networks.apply(networks.Model(config, params), xt, sigma)
        activations["act.output_layer"] = score_heads.logits(networks.Model(config, params), features)[
            ..., : config.num_states
        ]
        activations["log_score"] = goldens.log_score(name, params, xt, sigma)
        # A vector of ones in its first half comes out of the rotation as the cosines and the sines.
        half = config.head_size // 2
        ones = jnp.broadcast_to(jnp.arange(config.head_size) < half, (1, xt.shape[1], 1, config.head_size))
        cos, sin = jnp.split(attentions.rotate(ones.astype(jnp.float32))[0, :, 0], 2, axis=-1)
        return activations | {"rotary.cos": jnp.tile(cos, (1, 2)), "rotary.sin": jnp.tile(sin, (1, 2))}

    return compute(jnp.asarray(arrays["x"]), jnp.asarray(arrays["sigma"]))


@goldens.cases("model_.*_io.npz")
def test_recorded(entry):
    name = entry.file.removeprefix("model_").removesuffix("_io.npz")
    entry.check(recorded_activations(name)[entry.name])


@pytest.fixture(scope="module")
def tiny():
    """`TINY` with weights none of which is zero, tokens and noise levels."""
    shapes = jax.eval_shape(lambda: networks.init(jax.random.key(0), TINY))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), leaf.dtype), shapes)
    xt = jnp.asarray(rng.integers(0, TINY.num_states, (4, 10)), jnp.int32)
    return networks.Model(TINY, params), xt, jnp.array([0.01, 0.3, 1.0, 5.0])


def changed(model, **fields):
    """The same weights in a network of another config."""
    return model.replace(config=dataclasses.replace(model.config, **fields))


def combined(features):
    """A fixed combination of features."""
    return (features * jnp.cos(jnp.arange(features.size, dtype=jnp.float32)).reshape(features.shape)).sum()


def value_and_gradient(model, xt, sigma, dropout_key=None):
    """Features, and the gradient of a combination of them in the parameters."""

    def combine(model):
        features = networks.apply(model, xt, sigma, dropout_key)
        return combined(features), features

    gradient, features = jax.jit(jax.grad(combine, has_aux=True))(model)
    return features, gradient.params


@pytest.fixture(scope="module")
def reference(tiny):
    return value_and_gradient(*tiny)


def assert_close(ours, expected, tolerance=1e-4):
    """Per array, relative to its largest entry."""
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * (np.abs(b).max() + 1e-6))
    jax.tree.map(close, ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("remat", slow.all_but(["blocks"], ["none", "blocks"]))
def test_remat_changes_nothing(tiny, reference, remat):
    assert TINY.remat == "elementwise"
    model, xt, sigma = tiny
    assert_close(value_and_gradient(changed(model, remat=remat), xt, sigma), reference)


def test_remat_keeps_less(tiny):
    """What one block hands from the forward to the backward pass, in numbers per token."""
    model, xt, sigma = tiny

    def kept(remat):
        monitored = lambda model: networks.apply(model, xt, sigma).sum()
        backward = jax.eval_shape(lambda model: jax.vjp(monitored, model)[1], changed(model, remat=remat))
        per_layer = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape[:2] == (TINY.num_layers, len(xt))]
        return sum(leaf.size for leaf in per_layer) / (TINY.num_layers * xt.size * TINY.hidden_size)

    assert kept("blocks") == 1
    # The stream, qkv, attention and its sums, four products of the MLP's width or D; modulation once a sequence.
    sums, modulation = TINY.num_heads / TINY.hidden_size, 6 / xt.shape[1]
    assert kept("elementwise") == pytest.approx(1 + 3 + 1 + sums + 1 + TINY.mlp_ratio + 1 + modulation)
    assert kept("none") > 1.5 * kept("elementwise")


@pytest.mark.parametrize("remat", slow.all_but(["none"], ["none", "elementwise"]))
@pytest.mark.parametrize("layer_loop", slow.all_but(["unrolled"], ["rolled", "unrolled"]))
def test_the_loop_over_layers_changes_nothing(tiny, reference, remat, layer_loop):
    model, xt, sigma = tiny
    changes = {"remat": remat, "layer_loop": layer_loop}
    jaxpr = jax.make_jaxpr(networks.apply)(changed(model, **changes), xt, sigma)
    assert f"unroll={TINY.num_layers if layer_loop == 'unrolled' else 1}" in str(jaxpr)
    assert_close(value_and_gradient(changed(model, **changes), xt, sigma), reference)


@pytest.mark.parametrize(
    ("platform", "kind", "changes", "tokens", "unrolled"),
    [
        ("cpu", "cpu", {"remat": "none"}, 10**9, True),
        ("cpu", "cpu", {}, 8, False),
        ("tpu", "TPU v5e", {}, 8, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {}, 64 * 1024, True),
        ("gpu", "NVIDIA H100 80GB HBM3", {"remat": "blocks"}, 64 * 1024, False),
        ("gpu", "NVIDIA H100 80GB HBM3", {}, 128 * 1024, False),
        ("gpu", "NVIDIA A100-SXM4-40GB", {}, 64 * 1024, False),
        ("gpu", "an unknown card", {}, 8, False),
        ("gpu", "an unknown card", {"layer_loop": "unrolled"}, 10**9, True),
        ("cpu", "cpu", {"remat": "none", "layer_loop": "rolled"}, 8, False),
    ],
)
def test_layers_are_unrolled_where_it_pays_and_fits(monkeypatch, platform, kind, changes, tokens, unrolled):
    monkeypatch.setattr(networks.sharding, "platform", lambda: platform)
    monkeypatch.setattr(networks.sharding, "device_kind", lambda: kind)
    assert networks.is_unrolled(networks.NetworkConfig(num_states=50258, **changes), tokens) is unrolled


def test_bfloat16_is_close(tiny, reference):
    model, xt, sigma = tiny
    features = jax.jit(networks.apply)(changed(model, dtype="bfloat16"), xt, sigma)
    assert features.dtype == jnp.bfloat16
    error = np.abs(np.float32(features) - reference[0])
    assert 0 < error.mean() < 0.02 * np.abs(reference[0]).mean()


def test_padding_of_the_embedding_is_never_read(tiny, reference):
    model, xt, sigma = tiny
    padded = {"embedding": model.params["embedding"].at[TINY.num_states :].set(1e9)}
    features, gradient = value_and_gradient(model.replace(params=model.params | padded), xt, sigma)
    np.testing.assert_array_equal(features, reference[0])
    assert not gradient["embedding"][TINY.num_states :].any()


def test_sequences_do_not_mix(tiny, reference):
    model, xt, sigma = tiny
    features = jax.jit(networks.apply)(model, xt[1:2], sigma[1:2])
    np.testing.assert_allclose(features[0], reference[0][1], atol=1e-4)


def test_padded_sequences_give_what_they_give_alone(tiny):
    """Features and gradients of sequences cut to their lengths; what the padding is does not matter."""
    model, xt, sigma = tiny
    lengths = [10, 3]

    def of_tokens(features):
        """A fixed combination of the features of tokens, sequence by sequence, and they themselves."""
        cut = [row[:n] for row, n in zip(features, lengths, strict=True)]
        return sum(map(combined, cut)), cut

    def padded(model):
        return of_tokens(networks.apply(model, xt[:2], sigma[:2], None, jnp.array(lengths)))

    def alone(model):
        return of_tokens([networks.apply(model, xt[i : i + 1, :n], sigma[i : i + 1])[0] for i, n in enumerate(lengths)])

    ours, expected = (jax.jit(jax.grad(fn, has_aux=True))(model) for fn in (padded, alone))
    assert_close(ours, expected)


@pytest.mark.slow
def test_padding_of_the_splash_kernel_is_that_of_plain_products(tiny, monkeypatch):
    model, _, sigma = tiny
    xt, lengths = jax.random.randint(jax.random.key(0), (4, 128), 0, TINY.num_states), jnp.array([128, 90, 1, 17])
    monkeypatch.setitem(attentions.ATTENTIONS, "splash", functools.partial(attentions.splash, interpret=True))
    features = {
        name: jax.jit(lambda model: networks.apply(model, xt, sigma, None, lengths))(changed(model, attention=name))
        for name in ("splash", "plain")
    }
    is_token = jnp.arange(128)[None] < lengths[:, None]
    assert_close(features["splash"][is_token], features["plain"][is_token])


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(lambda key: networks.init(key, TINY))(jax.random.key(0))


def test_fresh_network_scores_every_token_alike(fresh):
    """Modulations and head start at zero; linear layers as PyTorch's."""
    for name in ("head_kernel", "head_bias"):
        assert not fresh[name].any()
    for modulation in (fresh["final_modulation"], fresh["blocks"]["modulation"]):
        assert not modulation["kernel"].any()
        assert not modulation["bias"].any()
    mlp_out = fresh["blocks"]["mlp_out"]["kernel"]
    bound = 1 / np.sqrt(TINY.mlp_ratio * TINY.hidden_size)
    assert 0.99 * bound < np.abs(mlp_out).max() <= bound
    assert np.std(mlp_out) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not np.allclose(mlp_out[0], mlp_out[1])


def test_dropout_is_off_without_a_key_and_random_with_one(tiny, reference):
    model, xt, sigma = tiny
    dropping = changed(model, dropout=0.1)
    apply = jax.jit(lambda key: networks.apply(dropping, xt, sigma, key))
    without_key = jax.jit(networks.apply)(dropping, xt, sigma)
    np.testing.assert_array_equal(without_key, jax.jit(networks.apply)(model, xt, sigma))
    one, same, other = apply(jax.random.key(1)), apply(jax.random.key(1)), apply(jax.random.key(2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - reference[0]).max() > 0.01


def test_dropout_has_its_rate_and_keeps_the_mean():
    x = networks._dropout(jax.random.key(0), 0.1, jnp.ones((100, 100, 10)))
    assert np.mean(np.asarray(x) == 0) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 1e5))
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.9], rtol=1e-6)
    assert networks._dropout(jax.random.key(1), 0.1, jnp.ones((1, 1, 8), jnp.bfloat16)).dtype == jnp.float32


def test_cheap_generator_drops_as_often(tiny, reference):
    model, xt, sigma = tiny
    dropping = changed(model, dropout=0.1, dropout_generator="rbg")
    apply = jax.jit(lambda key: networks.apply(dropping, xt, sigma, key))
    one, same, other = apply(jax.random.key(1)), apply(jax.random.key(1)), apply(jax.random.key(2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    key = networks._generator_key(jax.random.key(0), "rbg")
    dropped = np.mean(np.asarray(networks._dropout(key, 0.1, jnp.ones((100, 100, 10)))) == 0)
    assert dropped == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 1e5))


def test_layers_and_branches_drop_independently(fresh, monkeypatch):
    """With every branch adding 1 where it is not dropped, the residual stream counts the branches that were kept."""
    original = networks._dropout
    monkeypatch.setattr(networks, "_dropout", lambda key, rate, x: original(key, rate, jnp.ones_like(x)))
    gates = fresh["blocks"]["modulation"] | {"bias": jnp.ones_like(fresh["blocks"]["modulation"]["bias"])}
    params = fresh | {"embedding": 0 * fresh["embedding"], "blocks": fresh["blocks"] | {"modulation": gates}}
    model, xt = networks.Model(dataclasses.replace(TINY, dropout=0.5), params), jnp.zeros((1, 32), jnp.int32)
    features = jax.jit(lambda key: networks.apply(model, xt, jnp.ones((1,)), key))(jax.random.key(5))
    # 0 to 6 of the branches; were layers, or the branches of a layer, dropped together, at most 4 counts would occur.
    assert max(len(np.unique(np.round(row, 3))) for row in np.asarray(features[0])) > 5


def test_vocabulary_is_padded_to_a_multiple():
    assert [networks.NetworkConfig(num_states=n).padded_states for n in (1, 128, 129, 50258)] == [128, 128, 256, 50304]
