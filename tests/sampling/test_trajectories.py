"""Sequences at different steps: each has the distribution of a batch of its own, with no evaluation too many."""

import gc
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import categoricals, networks
from sedd_jax.reverse import samplers, steps, time_grids
from sedd_jax.sampling import refill, trajectories
from tests.support import oracles, slow, toy_sampler

N = 3
GRAPHS = {"absorb": graphs.Absorbing(vocab_size=N, mask_id=N), "uniform": graphs.Uniform(vocab_size=N)}
NOISES = {"absorb": noise_schedules.LogLinear(), "uniform": noise_schedules.Geometric(sigma_max=6.0)}
P0 = {
    "absorb": np.random.default_rng(0).dirichlet(np.full(N**3, 0.3)).reshape(N, N, N) * 0.95 + 0.05 / N**3,
    "uniform": np.random.default_rng(0).dirichlet(np.full(N**2, 0.5)).reshape(N, N) * 0.9 + 0.1 / N**2,
}
DRAWS = 2000


def exact_draws(kind, seen=None):
    """Draws from the exact score, as a whole array, at every sequence's own noise; `seen` gets each evaluation's xt."""
    exact = oracles.exact_score_fn(GRAPHS[kind], P0[kind])

    def evaluate(xt, sigma):
        if seen is not None:
            jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        score = jax.vmap(lambda xt, sigma: exact(xt[None], sigma[None])[0])(xt, sigma)
        return steps.Evaluation(jnp.nan_to_num(score, posinf=0.0), sigma)

    def draw(key, evaluation, xt, is_movable, jump_fn):
        return jnp.where(is_movable, categoricals.draw(key, oracles.jump_weights(jump_fn, evaluation.features, xt)), xt)

    return oracles.dense_draws(None, GRAPHS[kind])._replace(evaluate_fn=evaluate, draw_fn=draw)


def rules_of(kind, sampler="tweedie", eos_id=None, corrector_steps=0):
    process = forward.Process(GRAPHS[kind], NOISES[kind])
    made = samplers.make(sampler, corrector_steps=corrector_steps)
    return trajectories.Rules(process=process, sampler=made, eos_id=eos_id)


def programs_of(rules, draws):
    return trajectories.Programs(
        begin_fn=lambda key_limit, key_plan, sequences: trajectories.begin(key_limit, key_plan, rules, sequences),
        put_fn=jax.jit(lambda key, slots, *new: trajectories.put(key, rules, slots, *new)),
        advance_fn=jax.jit(
            lambda _, key, slots, start, stop: trajectories.advance(key, rules, lambda _: draws, slots, start, stop)
        ),
        finish_fn=lambda *_: None,
    )


def in_one_batch(key, rules, draws, given, num_steps):
    """Draws as `generate` does: all sequences at the same step, and all steps taken."""
    sample = lambda key: oracles.sample(key, rules.sampler, draws, rules.process, given, num_steps)
    return np.asarray(jax.jit(sample)(key))


def templates(length):
    """A sequence without known tokens, and one whose second token is known; they have different numbers of steps."""
    nothing = refill.Row(0, np.zeros(length, np.int32), np.zeros(length, bool), length, 3)
    second = refill.Row(1, np.full(length, 1, np.int32), np.arange(length) == 1, length, 2)
    return nothing, second


def refilled(rules, draws, num_slots=60):
    """Tokens of both templates, `DRAWS` of each, drawn in a random order through few slots."""
    length = P0["absorb" if rules.process.graph.has_mask else "uniform"].ndim
    order = np.random.default_rng(0).permutation(np.repeat([0, 1], DRAWS))
    rows = [templates(length)[kind]._replace(index=i) for i, kind in enumerate(order)]
    found = {
        row.index: tokens
        for row, tokens, _ in refill.drive(programs_of(rules, draws), None, jax.random.key(1), rows, num_slots)
    }
    assert len(found) == len(rows)
    return [np.stack([found[i] for i in np.flatnonzero(order == kind)]) for kind in (0, 1)]


def outcomes(tokens):
    return np.asarray(tokens) @ (N ** np.arange(tokens.shape[1]))


def same_distribution_p(one, other):
    """p-value of the hypothesis that two lists of outcomes have the same distribution."""
    counts = np.stack([np.bincount(x, minlength=max(one.max(), other.max()) + 1) for x in (one, other)])
    rare = counts.sum(0) < 20
    counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], axis=1)
    return scipy.stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue


@pytest.mark.parametrize(
    ("kind", "sampler", "corrector_steps"),
    slow.all_but(
        [("absorb", "first_hitting", 0)],
        [
            ("absorb", "tweedie", 0),
            ("absorb", "theta_trapezoidal", 0),
            ("absorb", "first_hitting", 0),
            ("absorb", "tweedie", 1),
            ("absorb", "first_hitting", 1),
            ("uniform", "euler", 0),
            ("uniform", "theta_trapezoidal", 0),
        ],
    ),
)
def test_a_refilled_place_has_the_distribution_of_a_batch_of_its_own(kind, sampler, corrector_steps):
    rules, draws = rules_of(kind, sampler, corrector_steps=corrector_steps), exact_draws(kind)
    for row, ours in zip(templates(P0[kind].ndim), refilled(rules, draws), strict=True):
        assert (ours < N).all()
        assert (ours[:, row.is_given] == 1).all()
        given = steps.Given(*(jnp.tile(jnp.asarray(x)[None], (10_000, 1)) for x in (row.tokens, row.is_given)))
        alone = in_one_batch(jax.random.key(2), rules, draws, given, row.num_steps)
        assert same_distribution_p(outcomes(ours), outcomes(alone)) > 1e-4
        if sampler in ("tweedie", "euler") and not corrector_steps and not row.is_given.any():
            distribution = oracles.sampler_distribution(GRAPHS[kind], NOISES[kind], P0[kind], sampler, row.num_steps)
            places = np.ravel_multi_index(tuple(ours.T), (GRAPHS[kind].num_states,) * P0[kind].ndim)
            assert oracles.chi_square_p(np.bincount(places, minlength=len(distribution)), distribution) > 1e-4


def cut(tokens, is_given, eos_id):
    """Texts up to the first drawn end of text, each as a number."""
    ends = (tokens == eos_id) & ~is_given
    kept = np.where(np.cumsum(ends, axis=1) > 0, N, tokens)
    return kept @ ((N + 1) ** np.arange(tokens.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", slow.all_but(["tweedie"], ["tweedie", "first_hitting"]))
def test_text_before_a_drawn_end_has_the_same_distribution_though_what_follows_is_left_out(sampler):
    rules, draws = rules_of("absorb", sampler, eos_id=1), exact_draws("absorb")
    left_out = 0
    for row, ours in zip(templates(3), refilled(rules, draws), strict=True):
        given = steps.Given(*(jnp.tile(jnp.asarray(x)[None], (10_000, 1)) for x in (row.tokens, row.is_given)))
        alone = in_one_batch(jax.random.key(2), rules_of("absorb", sampler), draws, given, row.num_steps)
        assert same_distribution_p(cut(ours, row.is_given, 1), cut(alone, row.is_given, 1)) > 1e-4
        left_out += (ours == N).any(1).mean()
        # Without a drawn end of text nothing is left out; a known one does not count.
        assert (ours[~((ours == 1) & ~row.is_given).any(1)] != N).all()
    assert left_out > 0.05


def rows_with_gaps(num_gaps, length, num_steps):
    is_given = [np.arange(length) >= n for n in num_gaps]
    return [
        refill.Row(i, np.zeros(length, np.int32), given, length, min(num_steps, max(0, n - 1)))
        for i, (n, given) in enumerate(zip(num_gaps, is_given, strict=True))
    ]


def filling_draws(seen, token=0):
    """Draws that turn every position that may move into one token; `seen` gets each evaluation's sigma."""

    def evaluate(xt, sigma):
        jax.debug.callback(lambda sigma: seen.append(np.asarray(sigma)), sigma)
        return steps.Evaluation(xt, sigma)

    def draw(key, evaluation, xt, is_movable, jump_fn):
        return jnp.where(is_movable, token, xt)

    def leap(key, rates, xt, is_movable):
        return jnp.where(is_movable, token, xt)

    of_positions = lambda evaluation, xt, is_needed: jnp.where(is_needed, 1.0, 0.0)
    return steps.Draws(evaluate, draw, leap, of_positions, of_positions)


def test_first_hitting_takes_as_many_evaluations_as_gaps_and_no_place_waits():
    num_gaps, num_slots, seen = [9, 1, 1, 1, 1, 1, 4, 0, 1, 9, 2], 3, []
    rules = rules_of("absorb", "first_hitting")
    rows = rows_with_gaps(num_gaps, 9, 100)
    programs = programs_of(rules, filling_draws(seen))
    drawn = list(refill.drive(programs, None, jax.random.key(0), rows, num_slots))
    jax.effects_barrier()
    assert {row.index: turns for row, _, turns in drawn} == dict(enumerate(num_gaps))
    # The slot that is free first takes the next sequence.
    free_at = [0] * num_slots
    for gaps in num_gaps:
        heapq.heapreplace(free_at, free_at[0] + gaps)
    assert len(seen) == max(free_at)
    assert len(seen) < sum(max(num_gaps[i : i + num_slots]) for i in range(0, len(num_gaps), num_slots))
    # With few steps, each fills several gaps.
    few = list(refill.drive(programs, None, jax.random.key(0), rows_with_gaps([9, 4, 2], 9, 2), num_slots))
    assert {row.index: turns for row, _, turns in few} == {0: 3, 1: 3, 2: 2}
    # Two steps, a corrector step after each, and the last evaluation.
    programs = programs_of(rules_of("absorb", "first_hitting", corrector_steps=1), filling_draws([]))
    ((_, _, turns),) = refill.drive(programs, None, jax.random.key(0), rows_with_gaps([4], 4, 2), 1)
    assert turns == 5


@pytest.mark.parametrize("sampler", ["tweedie", "theta_trapezoidal"])
def test_the_last_evaluation_leaves_no_mask_however_small_the_score(sampler):
    seen = []

    def evaluate(xt, sigma):
        jax.debug.callback(lambda sigma: seen.append(np.asarray(sigma)), sigma)
        return steps.Evaluation(jnp.full((*xt.shape, N + 1), 1e-9), sigma)

    draws = exact_draws("absorb")._replace(evaluate_fn=evaluate)
    rows = [row._replace(num_steps=n) for row, n in zip(rows_with_gaps([3, 3, 2], 3, 9), (1, 2, 4), strict=True)]
    programs = programs_of(rules_of("absorb", sampler), draws)
    drawn = list(refill.drive(programs, None, jax.random.key(0), rows, 2))
    assert {row.index: turns for row, _, turns in drawn} == {0: 2, 1: 3, 2: 5}
    assert all((tokens < N).all() for _, tokens, _ in drawn)
    # The noise is exactly that of `steps.denoise`. The other slot is empty.
    jax.effects_barrier()
    at_end = seen[-1 if sampler == "tweedie" else -2]
    np.testing.assert_array_equal(at_end, NOISES["absorb"].sigma(jnp.float32(time_grids.T_END)))


def test_what_is_denoised_does_not_leap():
    leaping = lambda key, rates, xt, is_movable: jnp.where(is_movable, 0, xt)
    draws = filling_draws([], token=1)._replace(leap_fn=leaping)
    rows = [row._replace(num_steps=n) for row, n in zip(rows_with_gaps([3, 3], 3, 9), (1, 2), strict=True)]
    drawn = refill.drive(programs_of(rules_of("uniform", "theta_trapezoidal"), draws), None, jax.random.key(0), rows, 2)
    assert [tokens.tolist() for _, tokens, _ in drawn] == [[1, 1, 1], [1, 1, 1]]


def test_only_the_first_of_two_draws_of_a_step_denoises():
    order = itertools.cycle([1, 2])

    def draw(key, evaluation, xt, is_movable, jump_fn):
        return jnp.where(is_movable, next(order), xt)

    rules = rules_of("uniform")._replace(sampler=toy_sampler.SAMPLER)
    rows = [row._replace(num_steps=n) for row, n in zip(rows_with_gaps([3, 3], 3, 9), (1, 2), strict=True)]
    drawn = refill.drive(programs_of(rules, filling_draws([])._replace(draw_fn=draw)), None, jax.random.key(0), rows, 2)
    assert [tokens.tolist() for _, tokens, _ in drawn] == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("sampler", ["euler", "theta_trapezoidal"])
def test_evaluations_end_with_the_last_mask(sampler):
    seen, rows = [], [row._replace(num_steps=7) for row in rows_with_gaps([5, 0, 3, 2, 1], 6, 7)]
    programs = programs_of(rules_of("absorb", sampler), filling_draws(seen))
    turns = {row.index: turns for row, _, turns in refill.drive(programs, None, jax.random.key(0), rows, 2)}
    jax.effects_barrier()
    assert turns == {0: 1, 1: 0, 2: 1, 3: 1, 4: 1}
    assert len(seen) == 2 * (2 if sampler == "theta_trapezoidal" else 1)


def test_the_uniform_graph_takes_all_steps_of_what_has_gaps():
    seen, rows = [], [row._replace(num_steps=7) for row in rows_with_gaps([5, 0, 3], 6, 7)]
    programs = programs_of(rules_of("uniform"), filling_draws(seen))
    drawn = list(refill.drive(programs, None, jax.random.key(0), rows, 3))
    jax.effects_barrier()
    assert {row.index: turns for row, _, turns in drawn} == {0: 8, 1: 0, 2: 8}
    assert len(seen) == 8


def test_masks_behind_what_is_asked_for_are_not_waited_for():
    """First hitting fills positions in a random order, and only positions before the end count."""
    rows = [row._replace(length=2) for row in rows_with_gaps([9] * 40, 9, 100)]
    programs = programs_of(rules_of("absorb", "first_hitting"), filling_draws([]))
    drawn = list(refill.drive(programs, None, jax.random.key(0), rows, 8))
    turns = np.array([turns for *_, turns in drawn])
    assert all((tokens[:2] == 0).all() for _, tokens, _ in drawn)
    # The later of two among nine in a random order is at number 6 2/3 on average.
    assert turns.mean() == pytest.approx(20 / 3, abs=1)
    assert turns.max() == 9


def test_told_of_turns_though_nothing_is_finished():
    told = []
    rows = [row._replace(num_steps=8) for row in rows_with_gaps([3, 3], 4, 8)]
    programs = programs_of(rules_of("uniform"), filling_draws([]))
    drawn = refill.drive(
        programs, None, jax.random.key(0), rows, 2, stride=4, tell=lambda *state: told.append(state[1:])
    )
    assert len(list(drawn)) == 2
    assert [finished.tolist() for finished, *_ in told] == [[False, False]] * 2 + [[True, True]]
    assert [turns.tolist() for *_, turns in told] == [[4, 4], [8, 8], [9, 9]]


@pytest.mark.slow
def test_programs_that_were_used_long_ago_are_given_back():
    """A page that is asked for ever new patterns keeps only the last programs."""
    rules = rules_of("absorb")
    network = networks.NetworkConfig(num_states=N + 1, hidden_size=4, num_heads=1, num_layers=1, cond_dim=4)
    trajectories.make_programs.cache_clear()
    counts = []
    for number in range(trajectories.KEPT + 2):
        programs = trajectories.make_programs(network, rules, (number, 2))
        programs.begin_fn(jax.random.key(0), jax.random.key(1), trajectories.nobody((2, 3)))
        del programs
        gc.collect()
        counts.append(len(jax.devices()[0].client.live_executables()))
    assert counts[trajectories.KEPT - 1] - counts[0] == trajectories.KEPT - 1
    assert counts[-1] == counts[trajectories.KEPT - 1]
    trajectories.make_programs.cache_clear()
