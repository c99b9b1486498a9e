"""The entropy-bounded sampler fills the surest masks first, within the bound that its definition gives."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.evaluation import generation_quality, quality_curves
from sedd_jax.reverse import entropy_bound, samplers, steps
from sedd_jax.sampling import generate, refill, templates, trajectories
from tests.support import oracles

N = 3
GRAPH = graphs.Absorbing(vocab_size=N, mask_id=N)
PROCESS = forward.Process(GRAPH, noise_schedules.LogLinear())
SAMPLER = samplers.SAMPLERS["entropy_bound"]
# The first token is nearly sure, and the others depend on each other.
P0 = np.random.default_rng(0).dirichlet(np.full(N**3, 0.3)).reshape(N, N, N)
P0[0] *= 0.02
P0[1] *= 0.02
P0 = P0 / P0.sum() * 0.95 + 0.05 / N**3


def score_fn(xt, _):
    """The exact conditional distribution of tokens. Noise changes it by a factor only."""
    joint = jnp.asarray(P0, jnp.float32)
    one_hot = jnp.where((xt == N)[..., None], 1.0, jax.nn.one_hot(xt, N))
    weights = []
    for position in range(3):
        known = [one_hot[:, axis] if axis != position else jnp.ones((len(xt), N)) for axis in range(3)]
        own = jnp.einsum("xyz,bx,by,bz->b" + "xyz"[position], joint, *known)
        weights.append(jnp.pad(own, ((0, 0), (0, 1))))
    return jnp.stack(weights, axis=1)


DRAWS = oracles.dense_draws(score_fn, GRAPH)


def sample(num_steps, given, draws=DRAWS, sampler=SAMPLER, seed=0):
    return jax.jit(lambda key: oracles.sample(key, sampler, draws, PROCESS, given, num_steps))(jax.random.key(seed))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_draws_have_the_distribution_that_the_definition_gives(num_steps):
    tokens = sample(num_steps, steps.nothing_given((20_000, 3)), seed=num_steps)
    counts = np.bincount(np.asarray(tokens) @ [N * N, N, 1], minlength=N**3)
    expected = oracles.entropy_bound(P0, num_steps + 1)
    assert oracles.chi_square_p(counts, expected.ravel()) > 1e-4
    if num_steps < 2:
        assert oracles.chi_square_p(counts, P0.ravel()) < 1e-6


def test_more_evaluations_are_less_biased_and_exact_conditionals_end_without_bias():
    """The bias of one evaluation is that of independent tokens; with one token at a time any order is exact."""
    biases = [np.abs(oracles.entropy_bound(P0, n) - P0).sum() / 2 for n in (1, 2, 3, 100)]
    assert biases == sorted(biases, reverse=True)
    assert biases[0] == pytest.approx(np.abs(independent() - P0).sum() / 2)
    assert biases[-1] < 1e-9


def independent():
    own = [P0.sum(tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return np.einsum("x,y,z->xyz", *own)


def test_the_surest_masks_come_first_within_a_share_of_the_bound():
    entropy = jnp.array([[3.0, 0.1, 9.0, 0.2, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 9.0, 0.0, 5.0]])
    is_mask = jnp.array([[True, True, False, True, True], [True] * 5, [True] * 5])
    fills = lambda *left: np.asarray(entropy_bound.within_bound(entropy, is_mask, jnp.array(left))).astype(int).tolist()
    # The bound of the first is 0.1 + 0.2 + 1 = 1.3.
    assert fills(13, 100, 100) == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]]
    assert fills(14, 4, 2) == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 1, 1]]
    assert fills(4, 2, 1) == [[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1] * 5]
    assert fills(1, 1, 1) == is_mask.astype(int).tolist()
    nothing = entropy_bound.within_bound(entropy, jnp.zeros_like(is_mask), jnp.array([1, 2, 3]))
    assert not nothing.any()


@pytest.mark.parametrize(("num_steps", "shares"), [(3, [2, 2, 2, 2]), (7, [1] * 8), (30, [1] * 8), (0, [8])])
def test_where_all_are_equally_unsure_shares_are_equal(num_steps, shares):
    moved = []

    def recorded(key, evaluation, xt, is_movable, jump_fn):
        jax.debug.callback(lambda x: moved.append(int(np.asarray(x).sum())), is_movable)
        return jnp.where(is_movable, 0, xt)

    draws = oracles.dense_draws(lambda xt, _: jnp.ones((*xt.shape, N + 1)), GRAPH)._replace(draw_fn=recorded)
    sample(SAMPLER.num_steps(num_steps, 8), steps.nothing_given((1, 8)), draws)
    jax.effects_barrier()
    assert moved == shares


def test_where_text_is_sure_fewer_evaluations_are_taken():
    seen = []

    def evaluated(xt, sigma):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part) for part in x]), xt, sigma)
        # The first six tokens are sure, the last two are not.
        sure = jax.nn.one_hot(jnp.zeros_like(xt), N + 1)
        return jnp.where(jnp.arange(8)[None, :, None] < 6, sure, jnp.ones_like(sure))

    draws = oracles.dense_draws(evaluated, GRAPH)
    tokens = sample(7, steps.nothing_given((2, 8)), draws)
    jax.effects_barrier()
    # Six at once, and the two after each other; `finish` has nothing left.
    assert [(xt == N).sum(1).tolist() for xt, _ in seen] == [[8, 8], [1, 1], [0, 0]]
    assert (tokens[:, :6] == 0).all()
    # The noise is that of the share of masks that is left.
    expected = -np.log1p(-np.array([1.0, 1 / 8]) * -np.expm1(-float(PROCESS.noise.sigma(jnp.float32(1.0)))))
    np.testing.assert_allclose([sigma[0] for _, sigma in seen[:2]], expected, rtol=1e-3)


def test_corrector_steps_draw_as_many_filled_tokens_again():
    seen = []

    def recorded(key, evaluation, xt, is_movable, jump_fn):
        jax.debug.callback(lambda *x: seen.append([np.asarray(part) for part in x]), xt == N, is_movable)
        return jnp.where(is_movable, 0, xt)

    def entropy(evaluation, xt, is_needed):
        """The left first where the first token is a mask, else the right: other masks than those taken back."""
        slope = jnp.where(xt[:, :1] == N, 0.01, -0.01)
        return jnp.where(is_needed, 1 + slope * jnp.arange(8)[None], 0.0)

    draws = oracles.dense_draws(lambda xt, _: jnp.ones((*xt.shape, N + 1)), GRAPH)
    draws = draws._replace(draw_fn=recorded, entropy_fn=entropy)
    sampler = dataclasses.replace(SAMPLER, corrector_steps=1)
    given = steps.Given(jnp.zeros((2, 8), jnp.int32), jnp.arange(8)[None] >= jnp.array([[8], [3]]))
    start = given.clamp(jnp.full((2, 8), N))
    jax.jit(lambda key: oracles.take_steps(key, sampler, draws, PROCESS, given, start, 0, 3, 3))(jax.random.key(0))
    jax.effects_barrier()
    assert [masks.sum(1).tolist() for masks, _ in seen] == [[8, 3], [8, 3], [6, 2], [6, 2], [4, 1], [4, 1]]
    assert [moved.sum(1).tolist() for _, moved in seen] == [[2, 1]] * 6
    # A corrector step fills what it has masked again, and no other mask.
    left = [masks & ~moved for masks, moved in seen]
    for step in range(0, 6, 2):
        np.testing.assert_array_equal(left[step], left[step + 1])
    assert (seen[2][1] != seen[3][1]).any()


@pytest.fixture
def looser(monkeypatch):
    """A network that has learned nothing is equally unsure of all tokens. Half more of the bound fills more of them."""
    monkeypatch.setattr(entropy_bound, "_SLACK", 0.5)
    trajectories.make_programs.cache_clear()
    yield
    trajectories.make_programs.cache_clear()


@pytest.mark.slow
def test_evaluations_are_counted_as_they_are_taken(code_run, looser, monkeypatch):
    """Of each sequence of a batch, however many gaps it has."""
    run = runs.load(code_run)
    sampling = run.sampling(sampler="entropy_bound", num_steps=3, num_samples=8)
    seen = []
    fill = entropy_bound._fill

    def recorded(key, draws, process, batch, xt, num_left, again):
        jax.debug.callback(lambda x: seen.append(np.asarray(x).any(1)), batch.given.is_movable(process.graph, xt))
        return fill(key, draws, process, batch, xt, num_left, again)

    monkeypatch.setattr(entropy_bound, "_fill", recorded)
    opened, num_gaps = run.restore(), np.array([20, 20, 20, 2, 2, 1, 1, 0])
    is_given = jnp.arange(32)[None] >= num_gaps[:, None]
    counted = []
    with opened.on_devices():
        given = steps.Given(jnp.zeros((8, 32), jnp.int32), is_given)
        generate.draw_tokens(opened, given, sampling, seed=0, count=counted.append)
        jax.effects_barrier()
        taken = np.sum(seen, axis=0)
        # Where there is nothing to fill, the sequence still is in a batch of one evaluation.
        np.testing.assert_array_equal(counted[0], np.maximum(taken, 1))
        assert taken[:3].min() > taken[3:5].max()
        assert taken[0] == 4


@pytest.mark.slow
def test_what_is_printed_says_that_it_is_biased_and_how_many_evaluations_it_took(code_run, judge_run, tmp_path, looser):
    run = shutil.copytree(code_run, tmp_path / "run")
    samples = generation_quality.Samples(num_samples=8, batch_size=8)
    found = generation_quality.measure(
        run, str(judge_run), samples=samples, sampler="entropy_bound", num_steps=12, draw="precise"
    )
    assert 1 < found["mean_nfe"] < found["nfe"] == 13
    printed = str(generation_quality.table(found))
    assert f"entropy_bound (biased), nfe {found['mean_nfe']:.1f} on average, at most 13, precise draws" in printed
    curve = quality_curves.Curve(samplers=["first_hitting", "entropy_bound"], num_evaluations=[13])
    both = quality_curves.measure(run, str(judge_run), curve, samples=samples)
    nfe = {point["sampler"]: point["nfe"] for point in both["points"] if point["draw"] == "precise"}
    assert nfe == {"first_hitting": 13, "entropy_bound": found["mean_nfe"]}
    assert "entropy_bound (biased), precise draws" in str(quality_curves.table(both))
    opened = runs.load(run).restore()
    sampling = opened.run.sampling(sampler="entropy_bound", num_steps=12, num_samples=8)
    template = templates.parse(opened.run, "a = {20}")
    with opened.on_devices():
        drawn = {one.nfe for one in generate.draw_samples(opened, template, sampling, seed=0)}
        # A slot is free as soon as the wanted tokens are filled.
        refilled = {one.nfe for one in refill.draw(opened, [template] * 3, sampling, seed=0)}
    assert 1 < min(refilled) <= min(drawn) <= max(drawn) < 13
