"""Corrector steps: laws after them by enumeration, and what they gain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import first_hitting, graphs, noise_schedules, samplers, time_grids
from tests.support import oracles

N = 3
GRAPHS = {"absorb": graphs.Absorbing(vocab_size=N, mask_id=N), "uniform": graphs.Uniform(vocab_size=N)}
NOISE = noise_schedules.Geometric(sigma_min=1e-2, sigma_max=3.0)
P0 = np.random.default_rng(0).dirichlet(np.full(N * N, 0.3)).reshape(N, N) * 0.95 + 0.05 / N**2
GRID, TIMES = "1,0.6,0", (1, 0.6, time_grids.T_END)
STEPS = len(TIMES) - 1


@functools.cache
def law_after(kind, sampler, corrector_steps):
    """The law after the steps of `GRID`, from the exact law at t = 1, by dense matrices; distance to the exact law."""
    graph = GRAPHS[kind]
    xs = oracles.states(graph, 2)
    sigmas = [float(NOISE.sigma(jnp.float32(t))) for t in TIMES]
    p = oracles.marginal(graph, P0, sigmas[0]).ravel()
    for t, sigma, end, after in zip(TIMES, sigmas, TIMES[1:], sigmas[1:], strict=False):
        rate = (t - end) * float(NOISE.dsigma_dt(jnp.float32(t)))
        weights = oracles.step_weights(graph, sampler, oracles.exact_scores(graph, P0, sigma), xs, sigma - after, rate)
        back = np.kron(*(oracles.kernel(graph, sigma - after),) * 2)
        reachable = np.where(oracles.marginal(graph, P0, sigma).ravel()[:, None, None] > 0, weights, 1.0)
        p = oracles.step(reachable, p)
        for _ in range(corrector_steps):
            p = oracles.step(reachable, back @ p)
    exact = oracles.marginal(graph, P0, sigmas[-1]).ravel()
    return p, np.abs(p - exact).sum() / 2


@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_draws_follow_the_law_by_enumeration(kind, sampler):
    graph, draws = GRAPHS[kind], 30_000
    start = oracles.marginal(graph, P0, float(NOISE.sigma(jnp.float32(1.0)))).ravel()
    xs = oracles.states(graph, 2)
    xt = jnp.asarray(xs[np.random.default_rng(1).choice(len(xs), size=draws, p=start / start.sum())])
    given = steps.nothing_given(xt.shape)
    predict = samplers.predictor(
        oracles.dense_move(oracles.exact_score_fn(graph, P0)), graph, NOISE, given, sampler=sampler
    )
    steps = jax.jit(
        lambda key, xt: samplers.reverse_steps(
            key, predict, graph, NOISE, given, xt, 0, STEPS, STEPS, grid=GRID, corrector_steps=2
        )
    )
    counts = np.bincount(np.asarray(steps(jax.random.key(0), xt)) @ [graph.num_states, 1], minlength=len(xs))
    law = law_after(kind, sampler, 2)[0]
    assert oracles.chi_square_p(counts, law) > 1e-4
    assert oracles.chi_square_p(counts, law_after(kind, sampler, 0)[0]) < 1e-4


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_they_bring_the_law_nearer_to_the_exact_one(kind):
    distances = [law_after(kind, "tweedie", n)[1] for n in (0, 2, 8)]
    assert distances[2] < distances[1] < distances[0] * 0.8


def test_given_tokens_are_never_taken_back():
    graph, seen = GRAPHS["absorb"], []
    given = steps.Given(jnp.full((50, 3), 2), jnp.tile(jnp.array([[True, False, False]]), (50, 1)))

    def move(key, xt, sigma, is_movable, jump_fn):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part) for part in x]), xt, is_movable)
        return oracles.dense_move(lambda xt, _: jnp.full((*xt.shape, N + 1), 1.0))(key, xt, sigma, is_movable, jump_fn)

    predict = samplers.predictor(move, graph, NOISE, given, sampler="tweedie")
    samplers.reverse_steps(
        jax.random.key(0), predict, graph, NOISE, given, jnp.full((50, 3), N), 0, 2, 2, corrector_steps=3
    )
    jax.effects_barrier()
    assert len(seen) == 2 * 4
    for xt, is_movable in seen:
        assert (xt[:, 0] == 2).all()
        assert not is_movable[:, 0].any()
    masks = [(xt == N).sum() for xt, _ in seen]
    assert masks[5] > 0  # What the step had filled was taken back.


def test_corrector_steps_of_first_hitting_are_gibbs_steps():
    """Two evaluations' worth of tokens at once, then corrected: nearer to the exact law, by the chain's own law."""
    graph, draws = GRAPHS["absorb"], 20_000
    joint = jnp.asarray(P0, jnp.float32)

    def move(key, xt, sigma, is_movable, jump_fn):
        padded = jnp.pad(joint, ((0, 1), (0, 1))).at[:N, N].set(joint.sum(1)).at[N, :N].set(joint.sum(0))
        score = jnp.stack([padded[:, xt[:, 1]].T, padded[xt[:, 0]]], axis=1).at[:, :, N].set(0.0)
        return oracles.dense_move(lambda *_: score)(key, xt, sigma, is_movable, jump_fn)

    def law(corrector_steps):
        """Both positions from their own laws, then one at random given the other, so many times."""
        p = np.multiply.outer(P0.sum(1), P0.sum(0))
        for _ in range(corrector_steps):
            p = (p.sum(0) * P0 / P0.sum(0) + p.sum(1)[:, None] * P0 / P0.sum(1, keepdims=True)) / 2
        return p.ravel()

    def drawn(corrector_steps):
        """First both at once, as from `finish`, then steps that begin with nothing to fill but what is taken back."""
        given = steps.nothing_given((draws, 2))
        key_pair, key_steps = jax.random.split(jax.random.key(corrector_steps))
        xt = first_hitting.finish(key_pair, move, graph, NOISE, given, jnp.full((draws, 2), N))
        course = first_hitting.draw_course(key_steps, graph, NOISE, given)
        again, steps = jnp.ones(draws, int), jnp.asarray(1)
        for number in range(corrector_steps):
            xt = first_hitting.turn(
                key_steps, course, jnp.asarray(number), move, graph, given, xt, again, steps, turns=2
            )
        return np.bincount(np.asarray(xt) @ [N, 1], minlength=N * N)

    for number, other in ((0, 1), (1, 0)):
        assert oracles.chi_square_p(drawn(number), law(number)) > 1e-4
        assert oracles.chi_square_p(drawn(number), law(other)) < 1e-4
    assert oracles.chi_square_p(drawn(8), P0.ravel()) > 1e-4


def test_first_hitting_takes_each_evaluation_again():
    seen = []

    def recorded(key, xt, sigma, is_movable, jump_fn):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part).sum(1) for part in x]), xt == N, is_movable)
        return jnp.where(is_movable, 0, xt)

    graph = GRAPHS["absorb"]
    given = steps.Given(jnp.zeros((2, 8), jnp.int32), jnp.arange(8)[None] >= jnp.array([[8], [3]]))
    xt = first_hitting.reverse_steps(
        jax.random.key(0), recorded, graph, NOISE, given, jnp.full((2, 8), N), 0, 3, 3, corrector_steps=1
    )
    jax.effects_barrier()
    assert ((xt == N).sum(1) == jnp.array([2, 0])).all()
    np.testing.assert_array_equal([masks for masks, _ in seen], [[8, 3], [8, 3], [6, 2], [6, 2], [4, 1], [4, 1]])
    np.testing.assert_array_equal([moved for _, moved in seen], [[2, 1]] * 6)
