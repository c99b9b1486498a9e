"""The first-hitting sampler: exact at one evaluation a token, and of a known distribution with fewer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks
from sedd_jax.reverse import first_hitting, samplers, steps
from sedd_jax.runtime import sharding
from sedd_jax.sampling import generate, refill, templates, trajectories
from tests.support import oracles, slow

N = 3
GRAPH = graphs.Absorbing(vocab_size=N, mask_id=N)
P0 = np.random.default_rng(0).dirichlet(np.full(N**3, 0.3)).reshape(N, N, N) * 0.95 + 0.05 / N**3
NOISES = {"loglinear": noise_schedules.LogLinear(), "geometric": noise_schedules.Geometric()}
NUM_DRAWS = 20_000
SAMPLER = samplers.SAMPLERS["first_hitting"]


def score_fn(xt, _):
    """The exact conditional distribution of tokens. Noise changes it by a factor only."""
    joint = jnp.asarray(P0, jnp.float32)
    marginals = jnp.zeros((N + 1,) * 3)
    for known in np.ndindex(2, 2, 2):
        axes = tuple(np.flatnonzero(1 - np.array(known)))
        places = tuple(slice(0, N) if known[i] else slice(N, N + 1) for i in range(3))
        marginals = marginals.at[places].set(joint.sum(axes, keepdims=True))
    weights = []
    for position in range(3):
        candidates = jnp.tile(xt[:, None], (1, N + 1, 1)).at[:, :, position].set(jnp.arange(N + 1)[None])
        weights.append(marginals[tuple(jnp.moveaxis(candidates, -1, 0))].at[:, N].set(0.0))
    return jnp.stack(weights, axis=1)


DRAWS = oracles.dense_draws(score_fn, GRAPH)


def sample(key, noise, given, num_steps, draws=DRAWS):
    """All steps and the last evaluation, as `generate` has them."""
    process = forward.Process(GRAPH, noise)
    return jax.jit(lambda key: oracles.sample(key, SAMPLER, draws, process, given, num_steps))(key)


def counts(tokens):
    return np.bincount(np.asarray(tokens) @ [N * N, N, 1], minlength=N**3)


@pytest.mark.parametrize("num_steps", slow.all_but([3], [2, 3, 9]))
@pytest.mark.parametrize("noise", sorted(NOISES))
def test_one_evaluation_a_token_is_exact(noise, num_steps):
    given = steps.nothing_given((NUM_DRAWS, 3))
    drawn = sample(jax.random.key(num_steps), NOISES[noise], given, num_steps)
    assert oracles.chi_square_p(counts(drawn), P0.ravel()) > 1e-4


def test_two_tokens_an_evaluation_have_the_distribution_of_independent_pairs():
    """A position at random from its own distribution, then the other two given it, each for itself."""
    distribution = np.zeros_like(P0)
    for first in range(3):
        second, third = (i for i in range(3) if i != first)
        own = P0.sum((second, third), keepdims=True)
        distribution += P0.sum(second, keepdims=True) * P0.sum(third, keepdims=True) / own / 3
    given = steps.nothing_given((NUM_DRAWS, 3))
    drawn = sample(jax.random.key(0), NOISES["loglinear"], given, 1)
    assert oracles.chi_square_p(counts(drawn), distribution.ravel()) > 1e-4
    assert oracles.chi_square_p(counts(drawn), P0.ravel()) < 1e-6


def test_infilling_follows_the_conditional_distribution_and_keeps_what_is_given():
    is_given = jnp.tile(jnp.array([[False, True, False]]), (NUM_DRAWS, 1))
    given = steps.Given(jnp.full((NUM_DRAWS, 3), 1), is_given)
    drawn = np.asarray(sample(jax.random.key(1), NOISES["loglinear"], given, 1))
    assert (drawn[:, 1] == 1).all()
    distribution = P0[:, 1] / P0[:, 1].sum()
    assert (
        oracles.chi_square_p(np.bincount(drawn[:, 0] * N + drawn[:, 2], minlength=N * N), distribution.ravel()) > 1e-4
    )


def test_noise_is_that_of_the_schedule_where_the_first_mask_is_filled_at_once(monkeypatch):
    """Where sigma is 20, the probability of a mask is 1 in float32, and so it is a moment later."""
    monkeypatch.setattr(jax.random, "exponential", lambda key, shape: jnp.zeros(shape))
    process = forward.Process(GRAPH, NOISES["geometric"])
    plan = SAMPLER.begin(jax.random.key(0), process, steps.nothing_given((2, 3)))
    np.testing.assert_allclose(plan.sigma, 20, rtol=1e-5)


@pytest.mark.parametrize("num_given", [0, 1])
@pytest.mark.parametrize("noise", slow.all_but(["loglinear"], sorted(NOISES)))
def test_every_sequence_has_a_clock_of_the_known_distribution(noise, num_given):
    """Of n masks left at m, the next goes at m u^(1/n): the powers of ratios are uniform, and independent."""
    seen = []

    def recorded(key, evaluation, xt, is_movable, jump_fn):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part) for part in x]), evaluation.sigma, xt, is_movable)
        return DRAWS.draw_fn(key, evaluation, xt, is_movable, jump_fn)

    given = steps.Given(jnp.ones((4000, 3), jnp.int32), jnp.tile(jnp.arange(3)[None] < num_given, (4000, 1)))
    sample(jax.random.key(2), NOISES[noise], given, 2 - num_given, DRAWS._replace(draw_fn=recorded))
    jax.effects_barrier()
    assert len(seen) == 3 - num_given
    before = np.full(4000, -np.expm1(-float(NOISES[noise].sigma(jnp.float32(1.0)))))
    powers = []
    for sigma, xt, is_movable in seen:
        left = (xt == N).sum(1)
        assert (left == left[0]).all()
        assert (is_movable.sum(1) == 1).all()
        masked = -np.expm1(-sigma)
        powers.append((masked / before) ** left[0])
        before = masked
        assert scipy.stats.kstest(powers[-1], "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(powers) - np.eye(len(seen))).max() < 0.06
    first = seen[0][2].argmax(1) - num_given
    assert oracles.chi_square_p(np.bincount(first), np.full(len(seen), 1 / len(seen))) > 1e-4


def test_gaps_of_each_sequence_are_filled_in_even_shares_and_nothing_is_evaluated_in_vain():
    seen = []

    def recorded(key, evaluation, xt, is_movable, jump_fn):
        jax.debug.callback(lambda x: seen.append(np.asarray(x).sum(1)), is_movable)
        return jnp.where(is_movable, 0, xt)

    draws = oracles.dense_draws(lambda xt, _: xt, GRAPH)._replace(draw_fn=recorded)
    length = 12
    num_gaps = np.array([12, 5, 1, 0])
    given = steps.Given(jnp.zeros((4, length), jnp.int32), jnp.arange(length)[None] >= num_gaps[:, None])
    out = sample(jax.random.key(3), NOISES["loglinear"], given, 3, draws)
    assert (np.asarray(out) == 0).all()
    np.testing.assert_array_equal(seen, [[3, 1, 1, 0], [3, 1, 0, 0], [3, 1, 0, 0], [3, 2, 0, 0]])
    seen.clear()
    short = steps.Given(given.tokens[1:], given.is_given[1:])
    sample(jax.random.key(3), NOISES["loglinear"], short, 100, draws)
    assert len(seen) == 6  # One for each of five gaps, and the last evaluation, which `generate` counts among them.


@pytest.fixture
def settings(code_run):
    run = runs.load(code_run)
    return run, run.sampling(sampler="first_hitting", num_steps=100, num_samples=8)


@pytest.mark.slow
def test_a_run_is_sampled_with_as_many_evaluations_as_gaps(settings):
    run, sampling = settings
    opened = run.restore()
    for text, nfe in (("a = {5}\n", 32 - 5), ("", 32)):
        template = templates.parse(run, text)
        with opened.on_devices():
            drawn = generate.draw_samples(opened, template, sampling, seed=0)
        assert {sample.nfe for sample in drawn} == {nfe}
        assert {sample.sampler for sample in drawn} == {"first_hitting"}
        for one in drawn:
            assert run.graph.mask_id not in one.tokens
            assert one.text.startswith(text.partition("{")[0])
    few = dataclasses.replace(sampling, num_steps=3)
    with opened.on_devices():
        assert generate.draw_samples(opened, template, few, seed=0)[0].nfe == 4


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "num_steps"), [(0, 100), (1, 100), (5, 3), (32, 20)])
def test_as_many_evaluations_are_taken_as_are_said(settings, gap, num_steps, monkeypatch):
    """Of refilled slots, which count what they take, as of batches, which know it beforehand."""
    run, sampling = settings
    sampling = dataclasses.replace(sampling, num_steps=num_steps)
    template = templates.parse(run, "a" * (32 - gap) + f"{{{gap}}}")
    fills, fill = [], first_hitting._fill

    def counted(*args):
        jax.debug.callback(lambda: fills.append(0))
        return fill(*args)

    monkeypatch.setattr(first_hitting, "_fill", counted)
    trajectories.make_programs.cache_clear()
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    step, params = run.params("ema_params", mesh)
    opened = runs.OpenRun(run=run, step=step, model=networks.Model(run.network, params), mesh=mesh)
    with opened.on_devices():
        (said,) = {one.nfe for one in generate.draw_samples(opened, template, sampling, seed=0)}
        jax.effects_barrier()
        assert len(fills) == said == max(1, min(num_steps + 1, gap))
        refilled = list(refill.draw(opened, [template] * 3, sampling, seed=0))
    assert {one.nfe for one in refilled} == {min(num_steps + 1, gap)}
    trajectories.make_programs.cache_clear()


@pytest.mark.slow
def test_watching_changes_nothing(settings):
    run, sampling = settings
    opened, template, shown = run.restore(), templates.parse(run, ""), []
    with opened.on_devices():
        alone = generate.draw_samples(opened, template, sampling, seed=0)
        watched = generate.draw_samples(
            opened, template, sampling, seed=0, watch=lambda *state: shown.append(state[:2])
        )
    assert [one.tokens for one in alone] == [one.tokens for one in watched]
    assert shown[-1] == (32, 32)


def test_the_uniform_graph_has_no_masks_to_follow():
    sampling = configs.SamplingConfig(sampler="first_hitting")
    network = dataclasses.replace(configs.Config().network, scale_by_sigma=False)
    uniform = configs.Config(graph=configs.GraphConfig(name="uniform"), network=network, sampling=sampling)
    with pytest.raises(ValueError, match=r"first_hitting follows masks, of which config\.graph\.name=uniform"):
        configs.validate(uniform)
