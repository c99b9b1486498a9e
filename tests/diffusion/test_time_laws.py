"""Times follow their distribution, cover the interval evenly, and weights make every mean that over even times."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from sedd_jax.diffusion import time_laws
from tests.support import oracles


def test_times_are_uniform_and_evenly_spaced():
    batch = 64
    draw = jax.jit(jax.vmap(lambda key: time_laws.sample_times(key, batch).t))
    times = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert times.min() >= time_laws.T_MIN
    assert times.max() <= 1.0
    spacing = (1 - time_laws.T_MIN) / batch
    np.testing.assert_allclose(np.diff(np.sort(times, -1), axis=-1), spacing, atol=1e-6)
    for column in (0, 17, 63):
        counts = np.histogram(times[:, column], bins=20, range=(time_laws.T_MIN, 1.0))[0]
        assert oracles.chi_square_p(counts, np.full(20, 0.05)) > 1e-4


def test_times_respect_their_minimum():
    times = time_laws.sample_times(jax.random.key(0), 1000, t_min=0.5).t
    assert 0.5 <= times.min() < 0.502
    assert 0.998 < times.max() <= 1.0


def assert_divided_out(times):
    """Weights make the mean of a function that over even times."""
    fine = np.linspace(time_laws.T_MIN, 1, 100_001)
    for function in (np.ones_like, np.square, lambda t: 1 / (0.1 + t)):
        means = (times.weights * function(times.t)).mean(-1)
        expected = np.trapezoid(function(fine), fine) / (1 - time_laws.T_MIN)
        assert abs(means.mean() - expected) < 5 * means.std() / len(means) ** 0.5 + 1e-6


def test_a_bell_of_times_is_divided_out():
    draw = jax.jit(jax.vmap(lambda key: time_laws.sample_times(key, 64, "bell")))
    times = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 2000)))
    assert times.t.min() >= time_laws.T_MIN
    assert times.t.max() <= 1.0
    below = scipy.stats.truncnorm(-0.5 / 0.3, 0.5 / 0.3, 0.5, 0.3).cdf(np.linspace(0, 1, 21))
    counts = np.histogram(times.t[:, 5], bins=np.linspace(time_laws.T_MIN, 1, 21))[0]
    assert oracles.chi_square_p(counts, np.diff(below)) > 1e-4
    assert_divided_out(times)


def test_the_learned_law_follows_the_losses_it_was_told_and_is_divided_out():
    rng = np.random.default_rng(0)
    size = lambda t: 0.1 + t**2  # The root mean square of the loss at each time, in some unit.
    moments = time_laws.no_moments()
    add = jax.jit(time_laws.add_losses)
    for _ in range(300):
        t = time_laws.T_MIN + (1 - time_laws.T_MIN) * rng.uniform(size=256)
        moments = add(moments, jnp.asarray(t), jnp.asarray(40 * size(t) * rng.normal(size=256)))
    found = np.asarray(time_laws.density(moments))
    middle = (np.arange(time_laws.NUM_INTERVALS) + 0.5) / time_laws.NUM_INTERVALS
    # Some 800 losses an interval: their root mean square is known to 2.5 %.
    np.testing.assert_allclose(found, 0.9 * size(middle) / size(middle).mean() + 0.1, rtol=0.1)

    draw = jax.jit(jax.vmap(lambda key: time_laws.sample_times(key, 64, "learned", moments=moments)))
    times = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 2000)))
    assert times.t.min() >= time_laws.T_MIN
    assert times.t.max() <= 1.0
    edges = np.linspace(time_laws.T_MIN, 1, time_laws.NUM_INTERVALS + 1)
    assert oracles.chi_square_p(np.histogram(times.t[:, 5], edges)[0], found / found.sum()) > 1e-4
    np.testing.assert_allclose(times.weights, 1 / found[np.digitize(times.t, edges[1:-1])], rtol=1e-5)
    assert_divided_out(times)
    # The law is good for something: the mean over a batch of independent times varies less.
    even = 0.1 + 0.9 * rng.uniform(size=100_000)
    assert np.var(times.weights[:, 5] * size(times.t[:, 5])) < np.var(size(even)) / 4


def test_the_learned_law_is_even_before_anything_is_learned_and_where_all_losses_are_alike():
    fresh = time_laws.no_moments()
    np.testing.assert_allclose(time_laws.density(fresh), 1.0, rtol=1e-6)
    t = jnp.linspace(time_laws.T_MIN, 1, 640)
    np.testing.assert_allclose(time_laws.density(time_laws.add_losses(fresh, t, jnp.full(640, 7.0))), 1.0, rtol=1e-5)


def test_the_learned_law_forgets():
    """After some hundreds of steps only what was told lately counts."""
    t = jnp.linspace(time_laws.T_MIN, 1, 640)
    add = jax.jit(time_laws.add_losses)
    moments = add(time_laws.no_moments(), t, 1000 * t)
    for _ in range(2000):
        moments = add(moments, t, jnp.ones(640))
    np.testing.assert_allclose(time_laws.density(moments), 1.0, rtol=1e-3)


def test_pairs_have_opposite_times_under_every_law():
    moments = time_laws.Moments(*jnp.asarray(np.random.default_rng(0).uniform(1, 9, (2, time_laws.NUM_INTERVALS))))
    for law in time_laws.time_laws():
        times = time_laws.sample_times(jax.random.key(0), 64, law, moments=moments, paired=True)
        np.testing.assert_allclose(times.t[0::2] + times.t[1::2], 1 + time_laws.T_MIN, rtol=1e-5)
        np.testing.assert_allclose(times.weights[0::2], times.weights[1::2], rtol=1e-4)
