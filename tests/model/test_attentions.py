"""Attention: every implementation against the plain formula, on whatever can run it here."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.model import attentions
from sedd_jax.runtime import sharding
from tests.support import slow


def dense(q, k, v, causal=False, lengths=None):
    """softmax(q k' / sqrt K) v, written out."""
    scores = jnp.einsum("blhk,bshk->bhls", q, k) / np.sqrt(q.shape[-1])
    length = q.shape[1]
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None], scores, -jnp.inf)
    if lengths is not None:
        scores = jnp.where((np.arange(length) < np.asarray(lengths)[:, None])[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(scores, axis=-1), v)


def normal(*shape):
    return jax.random.normal(jax.random.key(0), (4, *shape))


def value_and_gradients(fn, q, k, v, weights):
    """fn(q, k, v) and the gradients of a fixed combination of its entries."""

    def combine(*inputs):
        out = fn(*inputs)
        return (out.astype(jnp.float32) * weights).sum(), out

    gradients, out = jax.jit(jax.grad(combine, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def assert_close(ours, expected, tolerance):
    """Per array, relative to its largest entry."""
    for name, a, b in zip(("value", "dq", "dk", "dv"), ours, expected, strict=True):
        b = np.float32(b)
        np.testing.assert_allclose(np.float32(a), b, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("most_scores", [1, 2 * 9 * 9, 1 << 20], ids=["a head at a time", "two heads", "all heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_is_softmax_attention(causal, most_scores, monkeypatch):
    monkeypatch.setitem(attentions.BLOCK_SCORES, "cpu", most_scores)
    inputs = normal(3, 9, 2, 8)
    expected = value_and_gradients(functools.partial(dense, causal=causal), *inputs)
    assert_close(value_and_gradients(functools.partial(attentions.plain, causal=causal), *inputs), expected, 1e-5)


@pytest.mark.parametrize("most_scores", [2 * 9 * 9, 1 << 20], ids=["two heads", "all heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_never_attends_to_padding(causal, most_scores, monkeypatch):
    monkeypatch.setitem(attentions.BLOCK_SCORES, "cpu", most_scores)
    inputs, lengths = normal(4, 9, 2, 8), jnp.array([9, 4, 1, 8])
    plain = lambda q, k, v: attentions.plain(q, k, v, lengths, causal=causal)
    expected = value_and_gradients(functools.partial(dense, causal=causal, lengths=lengths), *inputs)
    assert_close(value_and_gradients(plain, *inputs), expected, 1e-5)


def test_plain_survives_large_scores():
    q, k, v, _ = normal(1, 9, 2, 8)
    np.testing.assert_allclose(attentions.plain(100 * q, 100 * k, v), dense(100 * q, 100 * k, v), atol=1e-4)


def test_plain_in_bfloat16_is_close():
    inputs = normal(2, 32, 2, 16)
    expected = value_and_gradients(dense, *inputs)
    halves = value_and_gradients(attentions.plain, *inputs[:3].astype(jnp.bfloat16), inputs[3])
    assert all(x.dtype == jnp.bfloat16 for x in halves)
    assert_close(halves, expected, 0.03)


SMALL_BLOCKS = attentions.splash_attention.BlockSizes(*(128,) * 8)


@pytest.mark.parametrize("causal", slow.all_but([True], [False, True]))
def test_splash_kernel_interpreted_equals_plain(causal):
    """Two blocks of keys, so that the running maximum is used."""
    inputs = normal(1, 256, 2, 64) * jnp.float32(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attentions.splash_attention, "BlockSizes", lambda *sizes: SMALL_BLOCKS)
        splash = functools.partial(attentions.splash, causal=causal, interpret=True)
        ours = value_and_gradients(splash, *inputs)
    assert_close(ours, value_and_gradients(functools.partial(attentions.plain, causal=causal), *inputs), 1e-5)


@pytest.mark.parametrize("causal", slow.all_but([False], [False, True]))
def test_splash_kernel_interpreted_never_attends_to_padding(causal):
    """Padding in the second block of keys, from within the first, and nowhere."""
    inputs, lengths = normal(3, 256, 1, 16) * jnp.float32(2), jnp.array([200, 5, 256])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attentions.splash_attention, "BlockSizes", lambda *sizes: SMALL_BLOCKS)
        splash = lambda q, k, v: attentions.splash(q, k, v, lengths, causal=causal, interpret=True)
        ours = value_and_gradients(splash, *inputs)
    expected = value_and_gradients(functools.partial(dense, causal=causal, lengths=lengths), *inputs)
    assert_close(ours, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [4, 3], ids=["heads split", "heads whole"])
@pytest.mark.parametrize("batch", [4, 3], ids=["batch split", "batch whole"])
def test_sharded_equals_unsharded(num_heads, batch):
    qkv = jax.random.normal(jax.random.key(0), (batch, 10, 3 * 8 * num_heads))
    # A new function each time: JAX would remember what it traced without a mesh.
    grad = lambda: jax.jit(jax.grad(lambda qkv: jnp.square(attentions.attend(qkv, num_heads, "plain")).sum()))
    expected = grad()(qkv)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        ours = grad()(qkv)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_sharded_padding_is_that_of_each_sequence():
    qkv, lengths = jax.random.normal(jax.random.key(0), (4, 10, 96)), jnp.array([10, 3, 1, 7])
    run = lambda: jax.jit(lambda qkv: attentions.attend(qkv, 4, "plain", lengths=lengths))(qkv)
    expected = run()
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        np.testing.assert_allclose(run(), expected, atol=1e-5)
    assert np.abs(expected - attentions.attend(qkv, 4, "plain"))[1:].max() > 0.1


def test_each_device_attends_for_its_own_heads(monkeypatch):
    seen = []

    def record(q, k, v, *, causal, precision):
        seen.append(q.shape)
        return v

    monkeypatch.setitem(attentions.ATTENTIONS, "plain", record)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        jax.eval_shape(functools.partial(attentions.attend, num_heads=4, implementation="plain"), jnp.ones((8, 5, 96)))
    assert seen == [(2, 5, 2, 8)]


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at_every_position = lambda x: attentions.rotate(jnp.tile(x, (1, 20, 1, 1)))[0, :, 0]
    scores = np.asarray(at_every_position(q) @ at_every_position(k).T)
    for distance in (0, 3, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)


def test_choice_by_platform():
    assert attentions.choose("cpu", 1024, jnp.bfloat16) == "plain"
    assert attentions.choose("gpu", 1000, jnp.bfloat16) == "cudnn"
    assert attentions.choose("gpu", 1024, jnp.float32) == "plain"
    assert attentions.choose("tpu", 1024, jnp.bfloat16) == "splash"
    assert attentions.choose("tpu", 1024, jnp.float32) == "plain"
    assert attentions.choose("tpu", 1000, jnp.bfloat16) == "plain"


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_an_implementation_of_another_platform_is_refused(implementation):
    with pytest.raises(ValueError, match=rf"attention={implementation} runs on a .* machine's CPU: .*attention=auto"):
        attentions.attend(jnp.ones((1, 128, 48), jnp.bfloat16), 2, implementation)


def test_splash_refuses_broken_rows_of_lanes():
    with pytest.raises(ValueError, match=r"divisible by 128, not config\.data\.length=100"):
        attentions.splash(*normal(1, 100, 2, 8)[:3], interpret=True)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", attentions.cudnn), ("tpu", attentions.splash)])
def test_kernels_refuse_float32(monkeypatch, platform, kernel):
    """Their products would round it."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    with pytest.raises(ValueError, match="needs bfloat16, not float32"):
        kernel(*normal(1, 128, 2, 8)[:3])


@pytest.mark.parametrize("causal", [False, True])
def test_what_cudnn_is_asked_for_never_attends_to_padding(causal, monkeypatch):
    """XLA answers in its place here."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **how: asked(*x, **how | {"implementation": "xla"}))
    inputs, lengths = normal(3, 9, 2, 8), jnp.array([9, 4, 1])
    cudnn = lambda q, k, v: attentions.cudnn(q, k, v, lengths, causal=causal)
    halves = value_and_gradients(cudnn, *inputs[:3].astype(jnp.bfloat16), inputs[3])
    assert_close(halves, value_and_gradients(functools.partial(dense, causal=causal, lengths=lengths), *inputs), 0.03)


# Other platforms need a process of their own: this one has eight CPU devices for good.
ON_GPU = """
import jax, numpy as np
from sedd_jax.model import attentions
qkv, weights = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 256, 768), (2, 256, 256)]))
grads = lambda implementation, dtype, **how: jax.jit(jax.value_and_grad(lambda qkv: (attentions.attend(
    qkv, 4, implementation, **how).astype("float32") * weights).sum()))(qkv.astype(dtype))[1]
assert attentions.choose(jax.default_backend(), 256, jax.numpy.bfloat16) == "cudnn"
for causal in (False, True):
    for lengths in (None, jax.numpy.array([256, 77])):
        how = dict(causal=causal, lengths=lengths)
        expected, ours = (
            np.float32(grads(*args, **how)) for args in (("plain", "float32"), ("auto", "bfloat16"))
        )
        assert np.abs(ours - expected).max() < 0.03 * np.abs(expected).max()
"""

FOR_TPU = """
from sedd_jax.runtime import hosts
hosts.compile_for_others()
import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from sedd_jax.model import attentions
from sedd_jax.runtime import sharding
devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), devices)
def loss(qkv, *lengths):
    return attentions.attend(qkv, 4, "auto", lengths=lengths[0] if lengths else None).astype("float32").sum()
with jax.set_mesh(mesh):
    tokens = NamedSharding(mesh, PartitionSpec("data"))
    qkv = jax.ShapeDtypeStruct((4, 1024, 768), "bfloat16", sharding=tokens)
    lengths = jax.ShapeDtypeStruct((4,), "int32", sharding=tokens)
    for arguments in ((qkv,), (qkv, lengths)):
        text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
        assert text.count("splash") > 2, text
        assert "[2,2,1024,1024]" not in text
"""


def run_python(code):
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine")
def test_cudnn_on_a_gpu_equals_plain():
    run_python(ON_GPU)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[tpu-plan]'"
)
def test_splash_compiles_for_a_tpu():
    run_python(FOR_TPU)
