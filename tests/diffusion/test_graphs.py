"""Graphs: recorded values, brute force against a dense matrix exponential at N = 5, and accuracy at N = 50257."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from sedd_jax.diffusion import graphs, noise_schedules, scores
from tests.support import goldens, oracles

SMALL = [
    graphs.Absorbing(vocab_size=5, mask_id=5),
    graphs.Absorbing(vocab_size=5, mask_id=2),
    graphs.Absorbing(vocab_size=5, mask_id=0),
    graphs.Uniform(vocab_size=5),
]
GPT2 = [graphs.Absorbing(vocab_size=50257, mask_id=50257), graphs.Uniform(vocab_size=50257)]
SIGMAS = np.array([1e-4, 0.03, 0.5, 2.0, 6.0], np.float32)
NOISES = [noise_schedules.LogLinear(), noise_schedules.Geometric(), noise_schedules.Geometric(sigma_min=1e-5)]


@functools.cache
def recorded_quantities(case: str) -> dict[str, jax.Array]:
    """Ours for every quantity recorded for one graph and size, by the names there."""
    kind, size = case.split(".")
    n = int(size[1:])
    graph = graphs.Absorbing(vocab_size=n, mask_id=n) if kind == "absorb" else graphs.Uniform(vocab_size=n)
    arrays = goldens.load("graph.npz")
    x0, xt, log_score, score = (jnp.asarray(arrays[f"{case}.{name}"]) for name in ("x0", "x", "log_score", "score"))

    @jax.jit
    def compute(sigma):
        every = jnp.arange(graph.num_states)[None]
        score_entropy = graph.score_entropy(scores.summarize(log_score, xt, x0), sigma, xt, x0)
        return {
            "rate": graph.rate_column(every)[0],
            "transp_rate": graph.rate_row(every)[0],
            "transition": graph.transition_column(x0, sigma),
            "transp_transition": graph.transition_row(xt, sigma),
            "transp_transition_full": graph.transition_row(jnp.tile(every, (len(sigma), 1)), sigma),
            "reverse_rate": reverse_rate(graph, score, xt),
            "score_entropy": score_entropy,
        }

    return compute(jnp.asarray(arrays["sigma"][:, 0]))


def reverse_rate(graph: graphs.Graph, score: jax.Array, xt: jax.Array) -> jax.Array:
    """Rates out of xt with minus their sum at xt, [B, L, V], from the one number the graph gives a position."""
    rate = graph.reverse_rate(xt)
    return oracles.jump_weights(lambda total: scores.Jump(stay=-rate * total, slope=rate), score, xt)


@goldens.cases("graph.npz", r"\.staggered_score(__f64)?$")
def test_recorded_staggered_scores_are_the_matrix_exponential(entry):
    """The recording confirms the definition that the Tweedie step is held against below."""
    kind, size, _ = entry.name.split(".")
    graph = graphs.Absorbing(vocab_size=int(size[1:]), mask_id=int(size[1:]))
    graph = graph if kind == "absorb" else graphs.Uniform(vocab_size=int(size[1:]))
    arrays = goldens.load("graph.npz")
    score, delta_sigma = np.float64(arrays[f"{kind}.{size}.score"]), np.float64(arrays["dsigma"][:, 0])
    entry.check(
        [s @ scipy.linalg.expm(-d * oracles.rate_matrix(graph)).T for s, d in zip(score, delta_sigma, strict=True)]
    )


@goldens.cases("graph.npz", r"^(?!.*staggered_score)")
def test_recorded(entry):
    kind, size, name = entry.name.split(".")
    entry.check(recorded_quantities(f"{kind}.{size}")[name.removesuffix("__f64").removesuffix("_true")])


@pytest.fixture(scope="module", params=SMALL, ids=str)
def brute(request):
    """A small graph, every pair (xt, x0) as [1, V * V] tokens, and random log scores for them."""
    graph = request.param
    v = graph.num_states
    xt, x0 = (jnp.asarray(x.reshape(1, -1), jnp.int32) for x in np.meshgrid(np.arange(v), np.arange(v), indexing="ij"))
    log_score = np.random.default_rng(0).normal(size=(1, v * v, v)).astype(np.float32)
    log_score[0, np.arange(v * v), xt[0]] = 0
    return graph, xt, x0, log_score


def reachable_pairs(graph: graphs.Graph, xt: jax.Array, x0: jax.Array) -> np.ndarray:
    """Where xt can come from x0, a clean token."""
    clean = np.asarray(x0[0]) != graph.mask_id if graph.has_mask else True
    return clean & (oracles.kernel(graph, 1.0)[xt[0], x0[0]] > 0)


def test_rates_are_those_of_the_dense_matrix(brute):
    graph = brute[0]
    every = jnp.arange(graph.num_states)[None]
    q = oracles.rate_matrix(graph)
    np.testing.assert_allclose(graph.rate_column(every)[0].T, q, atol=1e-7)
    np.testing.assert_allclose(graph.rate_row(every)[0], q, atol=1e-7)
    np.testing.assert_allclose(graph.rate_column(every)[0].sum(-1), 0, atol=1e-6)


def test_transitions_are_the_matrix_exponential(brute):
    graph = brute[0]
    every = jnp.tile(jnp.arange(graph.num_states)[None], (len(SIGMAS), 1))
    expected = np.stack([oracles.kernel(graph, float(sigma)) for sigma in SIGMAS])
    column, row = graph.transition_column(every, jnp.asarray(SIGMAS)), graph.transition_row(every, jnp.asarray(SIGMAS))
    np.testing.assert_allclose(jnp.swapaxes(column, 1, 2), expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-12)
    np.testing.assert_allclose(column.sum(-1), 1, rtol=1e-6)


def test_score_entropy_is_its_definition(brute):
    graph, xt, x0, log_score = brute
    q = oracles.rate_matrix(graph)
    reachable = reachable_pairs(graph, xt, x0)
    summary = scores.summarize(jnp.asarray(log_score), xt, x0)
    score_entropy = jax.jit(graph.score_entropy)
    for sigma in SIGMAS:
        ours = score_entropy(summary, jnp.full(1, sigma), xt, x0)[0]
        for i in np.flatnonzero(reachable):
            ratio = oracles.ratios(graph, float(sigma), xt[0, i], x0[0, i])
            expected = oracles.score_entropy(q[xt[0, i]], log_score[0, i].astype(float), ratio, xt[0, i])
            np.testing.assert_allclose(ours[i], expected, rtol=2e-5, atol=2e-6)


def test_score_entropy_is_never_negative_and_zero_at_the_true_ratio(brute):
    graph, xt, x0, _ = brute

    @jax.jit
    def score_entropy(log_score, sigma):
        return graph.score_entropy(scores.summarize(log_score, xt, x0), sigma, xt, x0)

    with jax.enable_x64(True):
        for sigma in SIGMAS[1:]:
            ratio = np.stack([oracles.ratios(graph, float(sigma), *pair) for pair in zip(xt[0], x0[0], strict=True)])
            value = score_entropy(np.log(np.maximum(ratio[None], 1e-300)), np.full(1, float(sigma)))[0]
            np.testing.assert_allclose(value[reachable_pairs(graph, xt, x0)], 0, atol=1e-9)


def test_reverse_weights_are_their_definition(brute):
    graph, xt, _, log_score = brute
    score = np.exp(log_score)
    for delta_sigma in SIGMAS[1:]:
        expected = oracles.step_weights(graph, "tweedie", score[0].astype(float), xt[0], float(delta_sigma), 0.0)
        removed = jnp.full(1, delta_sigma)
        weights = lambda jump, d=removed: oracles.jump_weights(
            lambda total: jump(total, xt, d), jnp.asarray(score), xt
        )[0]
        ours = weights(graph.tweedie_jump)
        if graph.has_mask:
            # A token that is not the mask stays; the definition says so up to a factor.
            expected /= np.where(xt[0] == graph.mask_id, 1.0, expected.sum(-1))[:, None]
            denoised = np.where(np.arange(graph.num_states) == graph.mask_id, 0.0, expected)
        else:
            denoised = expected
        scale = np.abs(expected).max(-1, keepdims=True)
        np.testing.assert_allclose(ours / scale, expected / scale, atol=2e-6)
        last = weights(graph.denoise_jump)
        moving = xt[0] == graph.mask_id if graph.has_mask else np.full(xt.shape[1], True)
        share = lambda w: w / np.abs(w).sum(-1, keepdims=True)
        np.testing.assert_allclose(share(np.asarray(last)[moving]), share(denoised[moving]), atol=2e-6)


@pytest.mark.parametrize("graph", SMALL, ids=str)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_sample_transition_follows_the_matrix_exponential(graph, sigma):
    tokens = [x for x in range(graph.num_states) if x != graph.mask_id]
    x0 = jnp.tile(jnp.array(tokens, jnp.int32), (4000, 1))
    xt = np.asarray(graph.sample_transition(jax.random.key(3), x0, jnp.full(4000, sigma)))
    for column, x in enumerate(tokens):
        counts = np.bincount(xt[:, column], minlength=graph.num_states)
        assert oracles.chi_square_p(counts, oracles.kernel(graph, sigma)[:, x]) > 1e-4


def test_sample_limit():
    masks = graphs.Absorbing(vocab_size=5, mask_id=2).sample_limit(jax.random.key(0), (3, 4))
    np.testing.assert_array_equal(masks, np.full((3, 4), 2))
    tokens = graphs.Uniform(vocab_size=5).sample_limit(jax.random.key(0), (2000, 4))
    assert oracles.chi_square_p(np.bincount(np.ravel(tokens), minlength=5), np.full(5, 0.2)) > 1e-4


def test_mask_may_be_any_id():
    last, middle = graphs.Absorbing(vocab_size=200, mask_id=200), graphs.Absorbing(vocab_size=200, mask_id=103)
    to_middle = jnp.array([x if x < 103 else x + 1 for x in range(200)] + [103])
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.integers(0, 200, (3, 8)), jnp.int32)
    xt = jnp.where(rng.random((3, 8)) < 0.5, 200, x0)
    log_score = jnp.asarray(rng.normal(size=(3, 8, 201)), jnp.float32)
    moved_score = jnp.empty_like(log_score).at[..., to_middle].set(log_score)
    sigma = jnp.array([0.1, 1.0, 3.0])
    summaries = [
        scores.summarize(log_score, xt, x0),
        scores.summarize(moved_score, to_middle[xt], to_middle[x0]),
    ]
    for name in ("score_entropy", "cross_entropy", "reconstruction"):
        ours = [
            getattr(last, name)(summaries[0], sigma, xt, x0),
            getattr(middle, name)(summaries[1], sigma, to_middle[xt], to_middle[x0]),
        ]
        np.testing.assert_allclose(*ours, rtol=1e-5)
    noised = last.sample_transition(jax.random.key(0), x0, sigma)
    np.testing.assert_array_equal(to_middle[noised], middle.sample_transition(jax.random.key(0), to_middle[x0], sigma))
    weights = [
        oracles.jump_weights(lambda total: last.tweedie_jump(total, xt, sigma), jnp.exp(log_score), xt),
        oracles.jump_weights(
            lambda total: middle.tweedie_jump(total, to_middle[xt], sigma), jnp.exp(moved_score), to_middle[xt]
        ),
    ]
    np.testing.assert_allclose(weights[0], weights[1][..., to_middle], rtol=1e-5, atol=1e-5)


def true_score_entropy(graph: graphs.Graph, log_score: np.ndarray, sigma: float, xt: int, x0: int) -> float:
    """The definition in float64 at any N, with ratios that never lose digits to a difference."""
    a, n = np.expm1(sigma), graph.vocab_size
    if graph.has_mask:
        rate, ratio = np.ones(n + 1), np.zeros(n + 1)
        ratio[x0] = 1 / a
    else:
        rate, ratio = np.full(n, 1 / n), np.ones(n)
        if xt == x0:
            ratio[:] = a / (a + n)
        else:
            ratio[x0] = (a + n) / a
    terms = np.exp(log_score) - ratio * log_score + scipy.special.xlogy(ratio, ratio) - ratio
    return float(np.delete(rate * terms, xt).sum())


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("graph", GPT2, ids=str)
def test_score_entropy_is_accurate_at_full_vocabulary(graph, noise):
    """At every time, moved or not, with random scores of the size a network gives."""
    t = jnp.array(np.geomspace(1e-5, 1.0, 16), jnp.float32)
    sigma = noise.sigma(t)
    masked = graph.has_mask
    x0 = 11
    xts = [graph.mask_id] if masked else [x0, 4711]
    rng = np.random.default_rng(0)
    summaries, expected = [], []
    for s in np.asarray(sigma, float):
        z = rng.normal(size=graph.num_states)
        log_score = z - np.log(np.expm1(s)) - np.log(graph.vocab_size) if masked else z
        for xt in xts:
            log_score[xt] = 0.0
            others = np.delete(log_score, xt)
            summaries.append((scipy.special.logsumexp(others), others.sum() / graph.num_states, log_score[x0]))
            expected.append(true_score_entropy(graph, log_score, s, xt, x0))
    shape = (len(t), len(xts))
    summary = scores.ScoreSummary(
        *(jnp.asarray(np.reshape(x, shape), jnp.float32) for x in zip(*summaries, strict=True))
    )
    xt = jnp.tile(jnp.array([xts], jnp.int32), (len(t), 1))
    value = jax.jit(graph.score_entropy)(summary, sigma, xt, jnp.full(shape, x0))
    np.testing.assert_allclose(value, np.reshape(expected, shape), rtol=1e-5)


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("graph", GPT2, ids=str)
def test_loss_terms_and_gradients_are_finite_at_every_time(graph, noise):
    t = jnp.geomspace(1e-5, 1.0, 3001)
    shape = (len(t), 3)
    masked = graph.has_mask
    current = graph.mask_id if masked else 11
    xt = jnp.tile(jnp.array([[current, 11, 4711]]), (len(t), 1))
    x0 = jnp.full(shape, 11)

    @jax.jit
    def terms(z):
        sigma = noise.sigma(t)
        scale = -(jnp.log(jnp.expm1(sigma)) + jnp.log(50257.0))[:, None] if masked else jnp.zeros_like(sigma)[:, None]
        at_x0 = jnp.where(xt == x0, 0.0, z[2] + scale)
        summary = scores.ScoreSummary(z[0] + jnp.log(50257.0) + scale, z[1] + scale, at_x0)
        values = [graph.score_entropy(summary, sigma, xt, x0)]
        if masked:
            values.append(graph.cross_entropy(summary, sigma, xt, x0))
        return noise.dsigma_dt(t)[:, None] * sum(values)

    for size in (0.0, 1.0, 20.0):
        z = size * jax.random.normal(jax.random.key(0), (3, *shape))
        value, pullback = jax.vjp(terms, z)
        assert jnp.isfinite(value).all()
        assert jnp.isfinite(pullback(jnp.ones_like(value))[0]).all()


@pytest.mark.parametrize("graph", [graphs.Absorbing(vocab_size=30, mask_id=30)], ids=str)
def test_cross_entropy_is_never_above_score_entropy(graph):
    rng = np.random.default_rng(0)
    t = jnp.array(np.geomspace(1e-3, 1.0, 64), jnp.float32)
    sigma = noise_schedules.LogLinear().sigma(t)
    xt, x0 = jnp.full((64, 16), 30), jnp.asarray(rng.integers(0, 30, (64, 16)), jnp.int32)
    log_score = jnp.asarray(rng.normal(scale=3.0, size=(64, 16, 31)), jnp.float32)
    summary = scores.summarize(log_score, xt, x0)
    score_entropy = graph.score_entropy(summary, sigma, xt, x0)
    cross_entropy = graph.cross_entropy(summary, sigma, xt, x0)
    assert (cross_entropy <= score_entropy * (1 + 1e-5) + 1e-5).all()
    total = -jnp.log(jnp.expm1(sigma))[:, None]
    at_the_known_sum = scores.ScoreSummary(total, summary.mean, summary.at_x0 - summary.logsumexp + total)
    rescaled = graph.score_entropy(at_the_known_sum, sigma, xt, x0)
    np.testing.assert_allclose(rescaled, cross_entropy, rtol=1e-4, atol=1e-4 * float(jnp.exp(total).max()))
