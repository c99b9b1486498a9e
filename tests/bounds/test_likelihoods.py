"""Bounds are exact where everything can be enumerated, and drawn the same however they are interrupted."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sedd_jax.bounds import likelihoods
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules, scores, time_laws
from tests.support import oracles

NOISES = {
    "absorb": noise_schedules.LogLinear(eps=1e-3),
    "uniform": noise_schedules.Geometric(sigma_min=1e-3, sigma_max=5.0),
}
P0 = np.array([0.5, 0.3, 0.2])


def _graph(kind, n=3):
    return graphs.Absorbing(vocab_size=n, mask_id=n) if kind == "absorb" else graphs.Uniform(vocab_size=n)


def _scores(graph, sigma, xt):
    """log of the exact score at xt of the distribution P0 of one token, [1, 1, V]."""
    score = oracles.exact_scores(graph, P0, sigma)[xt, 0]
    return jnp.log(jnp.asarray(score, jnp.float32))[None, None]


@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_the_prior_term_is_a_divergence(kind):
    graph, noise = _graph(kind), NOISES[kind]
    sigma = float(noise.sigma(jnp.float32(1.0)))
    for x0 in range(3):
        column = oracles.kernel(graph, sigma)[:, x0]
        # The mask or, with the probability that a token is left, any token; or any token in any case.
        start = [*[column[x0] / 3] * 3, 1 - column[x0]] if kind == "absorb" else [1 / 3] * 3
        expected = sum(p * math.log(p / q) for p, q in zip(column, start, strict=True) if p > 0)
        assert float(graph.limit_divergence(jnp.float32(sigma))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "perfect"), list(itertools.product(["absorb", "uniform"], [True, False])))
def test_reconstruction_is_what_the_last_step_gives(kind, perfect):
    graph = _graph(kind)
    sigma = float(NOISES[kind].sigma(jnp.float32(0.2)))
    random = np.random.default_rng(0)
    for xt in range(graph.num_states):
        log_score = _scores(graph, sigma, xt)
        if not perfect:
            log_score = log_score + random.normal(size=log_score.shape) * (np.arange(graph.num_states) != xt)
        score = np.exp(np.asarray(log_score, np.float64))[0, 0]
        if kind == "absorb":
            score[graph.mask_id] = 1.0 if xt == graph.mask_id else score[graph.mask_id]
        weights = oracles.step_weights(graph, "tweedie", score[None, None], np.array([[xt]]), sigma, 0.0)[0, 0]
        if kind == "absorb":
            weights[graph.mask_id] = 0
        kept = np.maximum(weights, 0)
        for x0 in range(3):
            if kind == "absorb" and xt not in (x0, graph.mask_id):
                continue  # cannot be
            tokens = lambda value: jnp.full((1, 1), value)
            summary = scores.summarize(log_score, tokens(xt), tokens(x0))
            found = float(graph.reconstruction(summary, jnp.full(1, sigma), tokens(xt), tokens(x0))[0, 0])
            exact = -math.log(kept[x0] / kept.sum()) if kept[x0] else math.inf
            assert found >= exact - 1e-4
            if math.isfinite(exact):
                assert found == pytest.approx(exact, abs=1e-4 if perfect or kind == "absorb" else 0.3)


@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_the_strict_bound_of_the_exact_score_is_the_entropy(kind):
    """With one token nothing is lost: prior, integral and reconstruction add up to -log p(x0) on average.

    This holds exactly if generation starts with the distribution at t = 1. The gap between the two is added here.
    """
    graph, noise = _graph(kind), NOISES[kind]
    edges = np.array([time_laws.T_MIN, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999, 1.0])
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    times, weights = (middle[:, None] + half[:, None] * nodes).ravel(), (half[:, None] * weights).ravel()
    # Every time (the last is where reconstruction begins), clean and noised token, as one batch.
    times = np.append(times, time_laws.T_MIN)
    sigmas = np.asarray(noise.sigma(jnp.asarray(times, jnp.float32)), np.float64)
    cases = list(itertools.product(range(len(times)), range(3), range(graph.num_states)))
    time, x0, xt = np.array(cases).T
    kernels = np.array([oracles.kernel(graph, sigma) for sigma in sigmas])
    probability = kernels[time, xt, x0] * P0[x0]
    with np.errstate(divide="ignore"):
        log_scores = np.log([oracles.exact_scores(graph, P0, sigma)[:, 0] for sigma in sigmas])[time, xt]
    t, x0, xt = jnp.asarray(times[time], jnp.float32), jnp.asarray(x0)[:, None], jnp.asarray(xt)[:, None]
    summary = scores.summarize(jnp.asarray(log_scores, jnp.float32)[:, None], xt, x0)
    process = forward.Process(graph, noise)
    bounds = jax.jit(lambda t: losses.bounds(lambda *_: summary, process, x0, xt, t).score_entropy)(t)
    last = graph.reconstruction(summary, noise.sigma(t), xt, x0)[:, 0]
    value = np.where(time == len(times) - 1, last, np.append(weights, 0.0)[time] * np.asarray(bounds))
    total = float(np.where(probability > 0, probability * value, 0.0).sum())
    total += float(graph.limit_divergence(noise.sigma(jnp.float32(1.0))))
    start = oracles.marginal(graph, P0, float(noise.sigma(jnp.float32(1.0))))
    entropy = -float(np.sum(P0 * np.log(P0)))
    limit = np.full(3, 1 / 3) if kind == "uniform" else np.append(start[:3].sum() * np.full(3, 1 / 3), start[3])
    gap = float(np.sum(start * np.log(start / limit)))
    assert total == pytest.approx(entropy + gap, abs=2e-4)


SEQUENCES = np.arange(70).reshape(7, 10)


def _values(key, x0, t):
    """Two quantities with known means: one that depends on time, one that does not."""
    noise = jax.random.normal(key, (len(t),))
    return jnp.stack([10 * t + noise, jnp.full(len(t), 3.0) + noise])


def _passes(**changed):
    return likelihoods.passes(_values, SEQUENCES, **{"batch_size": 3, "seed": 5} | changed)


def test_passes_estimate_means_and_errors():
    done = list(itertools.islice(_passes(), 400))
    estimates = likelihoods.combine(done)
    for estimate, expected in zip(estimates, ((1 + time_laws.T_MIN) / 2, 0.3), strict=True):
        assert abs(estimate.mean - expected) < 5 * estimate.stderr
    spread = np.std([np.sum(found.groups, axis=1) for found in done], axis=0) / math.sqrt(len(done))
    assert [estimate.stderr for estimate in estimates] == pytest.approx(spread.tolist(), rel=0.35)


def test_a_pass_depends_on_its_number_alone():
    done = list(itertools.islice(_passes(), 5))
    assert list(itertools.islice(_passes(first=3), 2)) == done[3:]
    assert next(_passes(seed=6)) != done[0]


def test_a_report_follows_each_pass():
    seen = []
    list(itertools.islice(_passes(report=lambda *what: seen.append(what)), 2))
    assert seen == [(0, 3 / 7), (0, 6 / 7), (0, 1.0), (1, 3 / 7), (1, 6 / 7), (1, 1.0)]


def test_one_pass_has_no_error_that_could_be_stated():
    done = list(itertools.islice(likelihoods.passes(_values, SEQUENCES[:1], batch_size=3, seed=0), 2))
    assert likelihoods.combine(done[:1])[0].stderr == math.inf
    assert 0 < likelihoods.combine(done)[0].stderr < math.inf


def _apart(key, x0, t):
    """Sequences whose levels differ a hundred times as much as times and noise change a value."""
    level = 40.0 * x0[:, 0]
    return (level + 2 * jnp.sin(3 * t) + (1 + t) * jax.random.normal(key, t.shape))[None]


def _other(key, x0, t):
    return _apart(key, x0, t) + 0.5 + 0.1 * t[None]


def _truths(num_sequences, length):
    """Expected values of `_apart` and of its difference to `_other`, per token."""
    ends = np.cos(3 * time_laws.T_MIN) - np.cos(3)
    mean = 40 * np.arange(num_sequences).mean() + 2 * ends / 3 / (1 - time_laws.T_MIN)
    return mean / length, (0.5 + 0.1 * (1 + time_laws.T_MIN) / 2) / length


def _until(target_stderr):
    """Draws passes until the standard error is small enough, as `sedd eval` does."""

    def draw(drawn):
        done = []
        while len(done) < likelihoods.num_passes(done, target_stderr, most=50):
            done.append(next(drawn))
        return done

    return draw


@pytest.mark.parametrize(
    ("num_sequences", "draw"),
    [
        (5, lambda drawn: list(itertools.islice(drawn, 4))),
        pytest.param(40, _until(0.015), marks=pytest.mark.slow),
        pytest.param(200, _until(0.006), marks=pytest.mark.slow),
    ],
    ids=["four passes of one group", "five groups", "sixteen groups"],
)
def test_the_interval_of_95_percent_holds_the_truth_as_often(num_sequences, draw):
    """Of 200 repetitions, also where passes go on until the error is small enough."""
    sequences = np.tile(np.arange(num_sequences)[:, None], (1, 10))
    truth, _ = _truths(num_sequences, 10)
    values_fn, held, stderrs, means = jax.jit(_apart), 0, [], []
    for seed in range(200):
        found = likelihoods.combine(draw(likelihoods.passes(values_fn, sequences, batch_size=256, seed=seed)))[0]
        held += abs(found.mean - truth) <= found.half_width
        stderrs.append(found.stderr)
        means.append(found.mean)
    assert 180 <= held <= 198
    assert np.mean(stderrs) == pytest.approx(np.std(means), rel=0.2)


def test_the_difference_of_two_models_has_an_error_of_its_own():
    sequences = np.tile(np.arange(40)[:, None], (1, 10))
    ours, others = (
        [*itertools.islice(likelihoods.passes(jax.jit(fn), sequences, batch_size=256, seed=3), 3)]
        for fn in (_apart, _other)
    )
    found = likelihoods.combine(likelihoods.difference(others, ours))[0]
    assert abs(found.mean - _truths(40, 10)[1]) <= found.half_width
    assert found.stderr < likelihoods.combine(ours)[0].stderr / 20
    exact = likelihoods.Pass([[0.1] * 5], is_exact=True)
    against = likelihoods.combine(likelihoods.difference(ours, [exact]))[0]
    assert against.mean == pytest.approx(likelihoods.combine(ours)[0].mean - 0.5)
    assert against.stderr == pytest.approx(likelihoods.combine(ours)[0].stderr)
    assert likelihoods.combine(likelihoods.difference([exact], [exact]))[0] == (0.0, 0.0, 0)


def test_what_is_exact_needs_one_pass():
    exact = likelihoods.Pass([[0.25, 0.5]], is_exact=True)
    assert likelihoods.combine([exact])[0] == (0.75, 0.0, 0)
    assert likelihoods.combine([exact])[0].half_width == 0
    assert likelihoods.num_passes([exact], 0.01, most=1000) == 1


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 16, 500])
def test_the_quantile_is_that_of_students_distribution(freedom):
    assert likelihoods.quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=5e-3)
