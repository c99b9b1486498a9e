"""Bounds on a continuation given its context are exact where the network knows the true conditionals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.bounds import continuations
from sedd_jax.diffusion import forward, graphs, noise_schedules, scores
from tests.support import oracles

# A distribution over four tokens of three kinds, none independent of another.
P0 = np.random.default_rng(0).dirichlet(np.full(3**4, 0.5)).reshape(3, 3, 3, 3)
ABSORBING = forward.Process(graphs.Absorbing(vocab_size=3, mask_id=3), noise_schedules.LogLinear(eps=1e-3))


def _true_conditionals():
    """log p(token at l | what is not masked), [4, 4, 4, 4, L, 4], 0 at what is known."""
    table = np.zeros((4, 4, 4, 4, 4, 4))
    for xt in itertools.product(range(4), repeat=4):
        known = P0[tuple(slice(None) if x == 3 else slice(x, x + 1) for x in xt)]
        for place, x in enumerate(xt):
            if x == 3:
                weights = known.sum(tuple(axis for axis in range(4) if axis != place))
                table[(*xt, place)][:3] = np.log(weights / weights.sum())
    return jnp.asarray(table, jnp.float32)


def _true_network(xt, x0, sigma):
    log_p = _true_conditionals_once[tuple(xt.T)]
    return scores.ScoreSummary(
        logsumexp=jnp.zeros(xt.shape),
        mean=jnp.zeros(xt.shape),
        at_x0=jnp.take_along_axis(log_p, x0[..., None], 2)[..., 0],
    )


_true_conditionals_once = _true_conditionals()


@pytest.mark.parametrize(("start", "stop"), [(1, 3), (0, 4), (2, 4), (0, 1)])
def test_the_expected_bound_is_the_likelihood_itself_where_the_score_is_true(start, stop):
    """What comes before is given, and what comes after is summed over."""
    draws, x0 = 4096, np.array([1, 0, 2, 1], np.int32)
    u = (jnp.arange(draws) + 0.5) / draws
    found = continuations.sequence_bounds(
        jax.random.key(0), _true_network, ABSORBING, jnp.tile(x0[None], (draws, 1)), start, stop, u, width=4
    )
    marginal = P0.sum(tuple(range(stop, 4)))[tuple(x0[:stop])]
    exact = -np.log(marginal / P0[tuple(x0[:start])].sum())
    stderr = float(jnp.std(found)) / np.sqrt(draws)
    assert stderr < 0.05
    assert float(found.mean()) == pytest.approx(exact, abs=4 * stderr + 1e-5)


def test_no_draw_sees_what_it_is_asked_for_and_the_context_is_never_noised():
    seen = []

    def network(xt, x0, sigma):
        seen.append((np.asarray(xt), np.asarray(sigma)))
        return scores.ScoreSummary(*(jnp.zeros(xt.shape),) * 3)

    x0 = jnp.tile(jnp.array([[0, 1, 2, 0, 1, 2]]), (64, 1))
    u = (jnp.arange(64) + 0.5) / 64
    continuations.sequence_bounds(jax.random.key(0), network, ABSORBING, x0, 2, 5, u, width=6)
    xt, sigma = seen[0]
    assert (xt[:, :2] == [0, 1]).all()
    assert (xt[:, 5] == 3).all()
    masks = (xt[:, 2:5] == 3).sum(1)
    assert np.bincount(masks, minlength=4).tolist() == [0, 21, 22, 21]
    noise = ABSORBING.noise
    assert sigma.min() >= float(noise.sigma(jnp.float32(1e-3)))
    assert sigma.max() <= float(noise.sigma(jnp.float32(1)))
    assert sigma[masks == 1].mean() < sigma[masks == 3].mean()


def test_on_the_uniform_graph_the_terms_at_the_ends_are_counted():
    """One token after a context of one: on average over it the bound is the entropy of the token given the context."""
    graph = graphs.Uniform(vocab_size=3)
    process = forward.Process(graph, noise_schedules.Geometric(sigma_min=1e-3, sigma_max=5.0))
    given = np.array([0.6, 0.3, 0.1])  # p(token | context)

    def network(xt, x0, sigma):
        stay = jnp.exp(-sigma)[:, None]
        p = stay * jnp.asarray(given, jnp.float32)[None] + (1 - stay) / 3
        ratios = jnp.log(p / jnp.take_along_axis(p, xt[:, 1:], 1))
        log_score = jnp.stack([jnp.zeros_like(ratios), ratios], axis=1)
        return scores.summarize(log_score, xt, x0)

    draws, total = 20000, 0.0
    u = (jnp.arange(draws) + 0.5) / draws
    for token in range(3):
        x0 = jnp.tile(jnp.array([[2, token, 0]]), (draws, 1))
        found = continuations.sequence_bounds(jax.random.key(token), network, process, x0, 1, 2, u, width=2)
        total += given[token] * float(found.mean())
    start = oracles.marginal(graph, given, float(process.noise.sigma(jnp.float32(1.0))))
    gap = float(np.sum(start * np.log(start * 3)))
    assert total == pytest.approx(-float(np.sum(given * np.log(given))) + gap, abs=0.02)


def test_choices_share_their_draws():
    """And draws go on until the best is ahead for certain, or the budget is spent."""
    parts = [continuations.Part(np.array([0, *rest], np.int32), 1) for rest in ([1, 2, 0], [1, 2, 0], [2, 2, 0])]

    def values_fn(key, part, u):
        tokens = np.zeros(4, np.int32)
        tokens[: len(part.tokens)] = part.tokens
        x0 = jnp.tile(jnp.asarray(tokens)[None], (len(u), 1))
        return continuations.sequence_bounds(
            key, _true_network, ABSORBING, x0, part.start, len(part.tokens), jnp.asarray(u), width=4
        )

    noise_fn = lambda key, part, u: jax.random.uniform(key, (len(u),)) + u
    noise = next(continuations.passes(noise_fn, parts, batch_size=32, seed=(0, 0)))
    assert noise.shape == (4, 3)
    assert (noise == noise[:, :1]).all()
    assert len(set(noise[:, 0])) == 4
    decided = continuations.estimate(values_fn, parts[1:], continuations.BUDGET)
    exact = [-np.log(P0[tuple(part.tokens)] / P0[0].sum()) for part in parts[1:]]
    assert decided.is_decided
    assert decided.best == int(np.argmin(exact))
    assert decided.num_times < 1024
    assert decided.lead > 3 * decided.lead_stderr
    assert decided.lead == pytest.approx(abs(exact[0] - exact[1]), abs=5 * decided.lead_stderr)
    never = continuations.estimate(values_fn, parts[:2], continuations.Budget(num_times=100))
    assert (never.is_decided, never.num_times, never.lead) == (False, 128, 0)
    single = continuations.estimate(values_fn, parts[:1], continuations.Budget(num_times=10**6, target_stderr=0.05))
    assert single.is_decided
    assert single.stderrs[0] <= 0.05 * 3
    assert single.lead is None
    assert single.nats[0] == pytest.approx(exact[0], abs=5 * single.stderrs[0])
