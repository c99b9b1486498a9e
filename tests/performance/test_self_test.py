"""The self-test passes here, and finds wrong values, wrong gradients, rounding and everything that raises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import attentions, layers
from sedd_jax.performance import self_test
from sedd_jax.runtime import sharding


def make_run(**fields):
    """A run of short sequences in float32."""
    small = {"data.length": 16, "network.hidden_size": 32, "network.num_heads": 2, "network.dtype": "float32"}
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return runs.unsaved(configs.parse(configs.merge(small | changed)), 11)


def verdicts(checks):
    return [check.is_right for check in checks]


def test_numbers_are_numpys():
    loss, derivative = self_test.beside_numpy()
    assert loss.is_right
    assert derivative.is_right


def test_a_wrong_layer_is_found(monkeypatch):
    monkeypatch.setattr(attentions, "rotate", lambda x: x)
    assert verdicts(self_test.beside_numpy()) == [False, False]


def test_a_wrong_gradient_is_found(monkeypatch):
    right = layers.modulated_norm
    stop = jax.lax.stop_gradient
    monkeypatch.setattr(layers, "modulated_norm", lambda x, weight, shift, scale: right(x, weight, shift, stop(scale)))
    assert verdicts(self_test.beside_numpy()) == [True, False]


def test_products_that_a_device_rounds_are_found(monkeypatch):
    monkeypatch.setattr(self_test, "TINY", dataclasses.replace(self_test.TINY, dtype="bfloat16"))
    assert verdicts(self_test.beside_numpy()) == [False, False]


def test_attention_is_compared_in_value_and_gradient(monkeypatch):
    plain, stop = attentions.plain, jax.lax.stop_gradient
    run = make_run(network__attention="cudnn")
    for fn, expected in (
        (plain, [True, True]),
        (lambda q, k, v, **rules: plain(q, k, v, **rules) * 1.01, [False, False]),
        (lambda q, k, v, **rules: plain(q, stop(k), v, **rules), [True, False]),
        (lambda q, k, v, **rules: plain(q, k, v, **rules) * jnp.nan, [False, False]),
    ):
        monkeypatch.setitem(attentions.ATTENTIONS, "cudnn", fn)
        assert verdicts(self_test.beside_plain(run, "cudnn")) == expected


def test_a_long_sequence_is_cut_but_not_its_remainder(monkeypatch):
    seen = []

    def record(q, k, v, **rules):
        seen.append(q.shape)
        return attentions.plain(q, k, v, **rules)

    monkeypatch.setitem(attentions.ATTENTIONS, "cudnn", record)
    monkeypatch.setattr(self_test, "LONGEST", 128)
    self_test.beside_plain(make_run(data__length=300), "cudnn")
    assert seen == [(1, 300, 2, 16), (1, 128 + 300 % 128, 1, 16)]


def test_what_raises_is_a_failed_check_on_one_line():
    def fail(error):
        raise error

    run = make_run(network__attention="cudnn")
    (refused,) = self_test._tried("attention", "mend it", lambda: self_test.beside_plain(run, "cudnn"))
    assert refused.found.startswith("--config.network.attention=cudnn runs on a GPU")
    assert not refused.is_right
    assert refused.remedy == ""
    (broken,) = self_test._tried("a step", "mend it", lambda: fail(NotImplementedError("\nno kernel\nmore")))
    assert broken == self_test.Check("a step", False, "NotImplementedError: no kernel", "mend it")


@pytest.mark.parametrize(("loss", "norm", "is_right"), [(1.0, 2.0, True), (math.nan, 2.0, False), (1.0, 0.0, False)])
def test_a_step_needs_a_finite_loss_and_a_gradient(monkeypatch, loss, norm, is_right):
    metrics = {"train/loss": loss, "train/grad_norm": norm}
    monkeypatch.setattr(self_test, "_compile", lambda lowered: lambda state, x0: (state, metrics))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    assert verdicts(self_test.optimizer_step(make_run(), mesh)) == [is_right]


@pytest.mark.parametrize(("length", "short"), [(1024, 128), (1000, 16)])
def test_a_shrunk_network_fills_the_mesh_and_gets_the_same_attention(length, short):
    run = make_run(data__length=length, network__hidden_size=768, network__num_heads=12)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=6), jax.devices()[:6])
    tiny = self_test.shrunk(run.config, mesh)
    configs.validate(tiny)
    assert tiny.network.head_size == 64
    assert (tiny.network.hidden_size, tiny.network.cond_dim, tiny.training.batch_size) == (384, 48, 12)
    assert tiny.data.length == short


def test_rates_have_the_figures_of_the_device(monkeypatch):
    monkeypatch.setitem(self_test.ADD_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(self_test.PRODUCT_SIZE, "cpu", 64)
    monkeypatch.setattr(self_test, "SECONDS_PER_RATE", 0.001)
    for kind, peaks in (("NVIDIA H200", [4800e9, 1979e12 / 2]), ("cpu", [None, None])):
        monkeypatch.setattr(sharding, "device_kind", lambda kind=kind: kind)
        found = self_test.rates(make_run().config)
        assert [rate.peak for rate in found] == peaks
        assert all(rate.per_second > 0 for rate in found)


def test_seconds_are_per_call(monkeypatch):
    """A clock on which each call takes a second, and the first one ten."""
    calls = []
    monkeypatch.setattr(self_test, "SECONDS_PER_RATE", 50.0)
    clock = lambda: len(calls) + 9.0 * bool(calls)
    monkeypatch.setattr(self_test.time, "perf_counter", clock)
    assert self_test._seconds(lambda x: calls.append(x) or x, jnp.zeros(())) == pytest.approx(1.0)
    assert len(calls) == 1 + 5 + 50
