"""Layers with a hand-written gradient equal their automatic gradient; float32 products say that they are float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules, time_laws
from sedd_jax.model import layers, networks, objectives, score_heads
from sedd_jax.runtime import sharding


def normal(*shapes):
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def plain_norm(x, weight, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * weight * (1 + scale) + shift


def plain_gelu(x, bias):
    z = x + bias
    return z * 0.5 * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize(
    ("ours", "plain", "inputs"),
    [
        (layers.modulated_norm, plain_norm, normal((2, 9, 16), (1, 1, 16), (2, 1, 16), (2, 1, 16))),
        (layers.biased_gelu, plain_gelu, normal((2, 9, 16), (1, 1, 16))),
        (layers.gather_gradient, lambda x: x, normal((2, 9, 16))),
    ],
    ids=["norm", "gelu", "gather"],
)
def test_value_and_gradient_equal_the_automatic_ones(ours, plain, inputs):
    cotangent = jax.random.normal(jax.random.key(9), inputs[0].shape)
    # The layers take weight and bias as vectors.
    flat = tuple(x.reshape(-1) if x.shape[:2] == (1, 1) else x for x in inputs)
    value, pull = jax.vjp(ours, *flat)
    expected, pull_plain = jax.vjp(plain, *inputs)
    for a, b in zip((value, *pull(cotangent)), (expected, *pull_plain(cotangent)), strict=True):
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-5, atol=1e-5)


def test_a_bias_of_a_bfloat16_layer_has_a_float32_gradient():
    """Summed in float32: in bfloat16 the sum of 4096 ones would stop at 256."""
    x, bias = jnp.full((1, 4096, 2), 30.0, jnp.bfloat16), jnp.zeros(2)
    _, pull = jax.vjp(layers.biased_gelu, x, bias)
    of_x, of_bias = pull(jnp.ones_like(x))
    assert (of_x.dtype, of_bias.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(of_bias, 4096)


def products(dtype, platform, monkeypatch):
    """Dtype of the factors and precision of every matrix product of a training step's gradient and of the logits."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    graph = graphs.Absorbing.from_tokenizer(30, None)
    process = forward.Process(graph, noise_schedules.SCHEDULES["loglinear"](eps=1e-3))
    config = networks.NetworkConfig(
        num_states=31, hidden_size=32, num_layers=2, num_heads=2, cond_dim=16, dtype=dtype, attention="plain"
    )
    params = jax.eval_shape(lambda: networks.init(jax.random.key(0), config))
    x0 = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(params, x0):
        model = networks.Model(config, params)
        key, key_dropout = jax.random.split(jax.random.key(0))
        z = score_heads.logits(model, networks.apply(model, x0, jnp.ones(2)))
        times = time_laws.Times(jnp.ones(2), jnp.ones(2))
        return objectives.mean_bounds(key, model, process, x0, times, key_dropout).score_entropy + z.sum()

    text = jax.jit(jax.grad(loss)).lower(params, x0).as_text()
    found = re.findall(r"dot_general.*?(?:precision = \[(\w+), \w+\])? : \(tensor<[^>]*x(\w+)>", text)
    assert len(found) == text.count("stablehlo.dot_general") > 20
    return set(found)


def test_float32_is_float32(monkeypatch):
    for platform in ("cpu", "gpu", "tpu"):
        assert products("float32", platform, monkeypatch) == {("HIGHEST", "f32")}


@pytest.mark.slow
def test_tensorfloat32_rounds_on_gpus_only(monkeypatch):
    """What embeds the noise level stays float32."""
    for platform in ("cpu", "tpu"):
        assert products("tensorfloat32", platform, monkeypatch) == {("HIGHEST", "f32")}
    assert products("tensorfloat32", "gpu", monkeypatch) == {("DEFAULT", "f32"), ("HIGHEST", "f32")}


def test_bfloat16_keeps_the_noise_level_in_float32(monkeypatch):
    found = products("bfloat16", "gpu", monkeypatch)
    assert {dtype for _, dtype in found} == {"bf16", "f32"}
    assert all(precision == "HIGHEST" for precision, dtype in found if dtype == "f32")
