"""Corrector steps: distributions after them by enumeration, and what they gain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.reverse import correctors, samplers, steps, time_grids
from tests.support import oracles, slow

N = 3
GRAPHS = {"absorb": graphs.Absorbing(vocab_size=N, mask_id=N), "uniform": graphs.Uniform(vocab_size=N)}
NOISE = noise_schedules.Geometric(sigma_min=1e-2, sigma_max=3.0)
P0 = np.random.default_rng(0).dirichlet(np.full(N * N, 0.3)).reshape(N, N) * 0.95 + 0.05 / N**2
GRID, TIMES = "1,0.6,0", (1, 0.6, time_grids.T_END)
STEPS = len(TIMES) - 1


@functools.cache
def distribution_after(kind, sampler, corrector_steps):
    """The distribution after the steps of `GRID`, from the exact one at t = 1, by dense matrices; its distance to the
    exact one."""
    graph = GRAPHS[kind]
    sigmas = [float(NOISE.sigma(jnp.float32(t))) for t in TIMES]
    p = oracles.marginal(graph, P0, sigmas[0]).ravel()
    for t, sigma, end, after in zip(TIMES, sigmas, TIMES[1:], sigmas[1:], strict=False):
        back = np.kron(*(oracles.kernel(graph, sigma - after),) * 2)
        take = lambda p, t=t, end=end: oracles.STEP_DISTRIBUTIONS[sampler](graph, NOISE, P0, p, t, end)
        p = take(p)
        for _ in range(corrector_steps):
            p = take(back @ p)
    exact = oracles.marginal(graph, P0, sigmas[-1]).ravel()
    return p, np.abs(p - exact).sum() / 2


@pytest.mark.parametrize(
    "sampler",
    slow.all_but(["tweedie"], sorted(name for name, one in samplers.SAMPLERS.items() if one.traits.takes_grid)),
)
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_draws_follow_the_distribution_by_enumeration(kind, sampler):
    graph, num_draws = GRAPHS[kind], 30_000
    start = oracles.marginal(graph, P0, float(NOISE.sigma(jnp.float32(1.0)))).ravel()
    xs = oracles.states(graph, 2)
    xt = jnp.asarray(xs[np.random.default_rng(1).choice(len(xs), size=num_draws, p=start / start.sum())])
    given = steps.nothing_given(xt.shape)
    draws, process = oracles.dense_draws(oracles.exact_score_fn(graph, P0), graph), forward.Process(graph, NOISE)
    made = samplers.make(sampler, grid=GRID, corrector_steps=2)
    take = jax.jit(lambda key, xt: oracles.take_steps(key, made, draws, process, given, xt, 0, STEPS, STEPS))
    counts = np.bincount(np.asarray(take(jax.random.key(0), xt)) @ [graph.num_states, 1], minlength=len(xs))
    distribution = distribution_after(kind, sampler, 2)[0]
    assert oracles.chi_square_p(counts, distribution) > 1e-4
    assert oracles.chi_square_p(counts, distribution_after(kind, sampler, 0)[0]) < 1e-4


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_they_bring_the_distribution_nearer_to_the_exact_one(kind):
    distances = [distribution_after(kind, "tweedie", n)[1] for n in (0, 2, 8)]
    assert distances[2] < distances[1] < distances[0] * 0.8


@pytest.mark.parametrize("name", slow.all_but(["euler", "first_hitting"], sorted(samplers.SAMPLERS)))
def test_given_tokens_are_never_taken_back(name):
    graph, sampler, seen = GRAPHS["absorb"], samplers.make(name, corrector_steps=3), []
    given = steps.Given(jnp.full((50, 3), 2), jnp.tile(jnp.array([[True, False, False]]), (50, 1)))

    def recorded(fn):
        def draw(key, what, xt, is_movable, *jump_fn):
            jax.debug.callback(lambda *x: seen.append([np.asarray(part) for part in x]), xt, is_movable)
            return fn(key, what, xt, is_movable, *jump_fn)

        return draw

    draws = oracles.dense_draws(lambda xt, _: jnp.full((*xt.shape, N + 1), 1.0), graph)
    draws = draws._replace(draw_fn=recorded(draws.draw_fn), leap_fn=recorded(draws.leap_fn))
    process, start = forward.Process(graph, NOISE), given.clamp(jnp.full((50, 3), N))
    jax.jit(lambda key: oracles.take_steps(key, sampler, draws, process, given, start, 0, 2, 2))(jax.random.key(0))
    jax.effects_barrier()
    evaluations = sampler.traits.evaluations
    assert len(seen) == 2 * 4 * evaluations
    for xt, is_movable in seen:
        assert (xt[:, 0] == 2).all()
        assert not is_movable[:, 0].any()
    num_masks = [(xt == N).sum() for xt, _ in seen]
    assert num_masks[5 * evaluations] > 0  # What the step had filled was taken back.


def test_any_of_the_filled_positions_are_masked_again():
    num_rows, is_filled = 6000, jnp.array([[True, False, True, True, False]])
    xt = jnp.tile(jnp.array([[0, N, 1, 2, 2]]), (num_rows, 1))
    masked = lambda count: np.asarray(
        correctors.mask_again(
            jax.random.key(0), N, xt, jnp.tile(is_filled, (num_rows, 1)), jnp.full(num_rows, count, jnp.int32)
        )
    )
    np.testing.assert_array_equal(masked(0), xt)
    np.testing.assert_array_equal(masked(7), jnp.where(is_filled, N, xt))
    pairs = (masked(2) == N)[:, [0, 2, 3]]
    assert (pairs.sum(1) == 2).all()
    assert oracles.chi_square_p(np.bincount(pairs.argmin(1)), np.full(3, 1 / 3)) > 1e-4
    np.testing.assert_array_equal(np.where(masked(2) == N, xt, masked(2)), xt)


@pytest.mark.slow
def test_corrector_steps_of_first_hitting_are_gibbs_steps():
    """Two evaluations' worth of tokens at once, then corrected: nearer to the truth, as the chain itself says."""
    process, num_draws = forward.Process(GRAPHS["absorb"], NOISE), 20_000
    sampler, joint = samplers.make("first_hitting", corrector_steps=1), jnp.asarray(P0, jnp.float32)

    def score_fn(xt, _):
        padded = jnp.pad(joint, ((0, 1), (0, 1))).at[:N, N].set(joint.sum(1)).at[N, :N].set(joint.sum(0))
        return jnp.stack([padded[:, xt[:, 1]].T, padded[xt[:, 0]]], axis=1).at[:, :, N].set(0.0)

    def distribution(corrector_steps):
        """Both positions from their own distributions, then one at random given the other, so many times."""
        p = np.multiply.outer(P0.sum(1), P0.sum(0))
        for _ in range(corrector_steps):
            p = (p.sum(0) * P0 / P0.sum(0) + p.sum(1)[:, None] * P0 / P0.sum(1, keepdims=True)) / 2
        return p.ravel()

    def drawn(corrector_steps):
        """First both at once, as from `finish`, then steps that begin with nothing to fill but what is taken back."""
        given, draws = steps.nothing_given((num_draws, 2)), oracles.dense_draws(score_fn, process.graph)
        key_pair, key_steps = jax.random.split(jax.random.key(corrector_steps))

        def batch(key, xt, iteration):
            each = lambda value: jnp.full(num_draws, value, jnp.int32)
            return steps.Batch(given, xt, each(iteration), each(1), sampler.begin(key, process, given))

        masks = jnp.full((num_draws, 2), N)
        # It has no use for the key of the last evaluation.
        xt = sampler.finish(key_pair, jax.random.key(9), draws, process, batch(key_pair, masks, 2))
        for number in range(corrector_steps):
            xt = sampler.take(key_steps, jnp.asarray(number), draws, process, batch(key_steps, xt, 1))
        return np.bincount(np.asarray(xt) @ [N, 1], minlength=N * N)

    for number, other in ((0, 1), (1, 0)):
        assert oracles.chi_square_p(drawn(number), distribution(number)) > 1e-4
        assert oracles.chi_square_p(drawn(number), distribution(other)) < 1e-4
    assert oracles.chi_square_p(drawn(8), P0.ravel()) > 1e-4


def test_first_hitting_takes_each_evaluation_again():
    seen = []

    def recorded(key, evaluation, xt, is_movable, jump_fn):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part).sum(1) for part in x]), xt == N, is_movable)
        return jnp.where(is_movable, 0, xt)

    process, sampler = forward.Process(GRAPHS["absorb"], NOISE), samplers.make("first_hitting", corrector_steps=1)
    draws = oracles.dense_draws(lambda xt, _: xt, process.graph)._replace(draw_fn=recorded)
    given = steps.Given(jnp.zeros((2, 8), jnp.int32), jnp.arange(8)[None] >= jnp.array([[8], [3]]))
    start = given.clamp(jnp.full((2, 8), N))
    take = jax.jit(lambda key: oracles.take_steps(key, sampler, draws, process, given, start, 0, 3, 3))
    xt = np.asarray(take(jax.random.key(0)))
    jax.effects_barrier()
    assert ((xt == N).sum(1) == [2, 0]).all()
    np.testing.assert_array_equal([masks for masks, _ in seen], [[8, 3], [8, 3], [6, 2], [6, 2], [4, 1], [4, 1]])
    np.testing.assert_array_equal([moved for _, moved in seen], [[2, 1]] * 6)
