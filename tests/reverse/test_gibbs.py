"""Gibbs correctors: distributions by enumeration, which evaluations they take, and margins against whole arrays."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks, score_draws, score_heads, tiles
from sedd_jax.reverse import correctors, samplers, steps, time_grids
from tests.support import oracles, slow

N = 3
GRAPH = graphs.Uniform(vocab_size=N)
NOISE = noise_schedules.Geometric(sigma_min=1e-2, sigma_max=3.0)
PROCESS = forward.Process(GRAPH, NOISE)
P0 = np.random.default_rng(0).dirichlet(np.full(N * N, 0.3)).reshape(N, N) * 0.95 + 0.05 / N**2
GRID, TIMES = "1,0.6,0", (1, 0.6, time_grids.T_END)
XS = oracles.states(GRAPH, 2)
STEPPING = sorted(name for name, one in samplers.SAMPLERS.items() if one.traits.takes_grid)


def redraws(sigma: float, corrector: str) -> np.ndarray:
    """Distribution after redrawing tokens at one noise level, from each state, by the definition; [9, 9]."""
    score = oracles.exact_scores(GRAPH, P0, sigma)
    probs = score / score.sum(-1, keepdims=True)
    best = np.sort(probs, axis=-1)
    order, moved = np.argsort(best[..., -1] - best[..., -2], axis=-1), np.zeros((9, 9))
    stays = np.eye(N)[XS]
    for i in range(9):
        if corrector == "gibbs":
            moved[i] = (np.kron(probs[i, 0], stays[i, 1]) + np.kron(stays[i, 0], probs[i, 1])) / 2
            continue
        chosen = order[i, : int(corrector.rpartition(":")[2])]
        moved[i] = np.kron(*(probs[i, p] if p in chosen else stays[i, p] for p in range(2)))
    return moved


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


@functools.cache
def distribution_after(sampler: str, corrector: str, corrector_steps: int) -> np.ndarray:
    """After the steps of `GRID` with corrector steps, from the exact one at t = 1, by dense matrices."""
    p = oracles.marginal(GRAPH, P0, float(NOISE.sigma(jnp.float32(1.0)))).ravel()
    for t, end in itertools.pairwise(TIMES):
        p = oracles.STEP_DISTRIBUTIONS[sampler](GRAPH, NOISE, P0, p, t, end)
        after = redraws(float(NOISE.sigma(jnp.float32(end))), corrector)
        for _ in range(corrector_steps * samplers.SAMPLERS[sampler].traits.evaluations):
            p = p @ after
    return p


# Total variation between the exact distribution and that after one redraw, where tokens depend strongly on each other.
DISTANCES = {"gibbs": (0, 0, 0), "gibbs:margin:1": (0, 0.191, 0.134), "gibbs:margin:2": (0.001, 0.148, 0.169)}


@pytest.mark.parametrize("corrector", DISTANCES)
def test_one_position_at_random_leaves_the_distribution_as_it_is_and_least_margins_only_nearly(corrector):
    found = []
    for t in TIMES:
        sigma = float(NOISE.sigma(jnp.float32(t)))
        p = oracles.marginal(GRAPH, P0, sigma).ravel()
        found.append(distance(p @ redraws(sigma, corrector), p))
    np.testing.assert_allclose(found, DISTANCES[corrector], atol=1e-12 if corrector == "gibbs" else 6e-4)


@pytest.mark.parametrize("corrector", ["gibbs", *slow.all_but([], ["gibbs:margin:1"]), "gibbs:margin:2"])
@pytest.mark.parametrize("sampler", slow.all_but(["euler"], STEPPING))
def test_draws_follow_the_distribution_by_enumeration(sampler, corrector):
    start = oracles.marginal(GRAPH, P0, float(NOISE.sigma(jnp.float32(1.0)))).ravel()
    xt = jnp.asarray(XS[np.random.default_rng(1).choice(9, size=30_000, p=start / start.sum())])
    given, draws = steps.nothing_given(xt.shape), oracles.dense_draws(oracles.exact_score_fn(GRAPH, P0), GRAPH)
    made = samplers.make(sampler, grid=GRID, corrector_steps=2, corrector=corrector)
    take = jax.jit(lambda key, xt: oracles.take_steps(key, made, draws, PROCESS, given, xt, 0, 2, 2))
    counts = np.bincount(np.asarray(take(jax.random.key(0), xt)) @ [N, 1], minlength=9)
    assert oracles.chi_square_p(counts, distribution_after(sampler, corrector, 2)) > 1e-4
    assert oracles.chi_square_p(counts, distribution_after(sampler, corrector, 0)) < 1e-4


@pytest.mark.parametrize("sampler", STEPPING)
def test_exact_redraws_bring_the_distribution_nearer_to_the_exact_one(sampler):
    exact = oracles.marginal(GRAPH, P0, float(NOISE.sigma(jnp.float32(TIMES[-1])))).ravel()
    distances = [distance(distribution_after(sampler, "gibbs", n), exact) for n in (0, 1, 8)]
    assert distances[2] < distances[1] < distances[0]


def test_sequences_correct_and_step_side_by_side():
    """Each takes the evaluations of its own phase; those that correct change one open position, never a given one."""
    seen = []

    def score_fn(xt, sigma):
        jax.debug.callback(lambda sigma: seen.append(np.asarray(sigma)), sigma)
        return jnp.ones((*xt.shape, N))

    rows, length = 60, 6
    given = steps.Given(jnp.full((rows, length), 2), jnp.tile(jnp.arange(length)[None] == 1, (rows, 1)))
    xt, iteration = given.clamp(jnp.zeros((rows, length), jnp.int32)), jnp.arange(rows) % 2
    batch = steps.Batch(given, xt, iteration, jnp.full(rows, 2), None)
    made = samplers.make("theta_trapezoidal", grid=GRID, corrector_steps=1, corrector="gibbs")
    draws = oracles.dense_draws(score_fn, GRAPH)
    after = np.asarray(jax.jit(lambda key: made.take(key, jnp.asarray(0), draws, PROCESS, batch))(jax.random.key(0)))
    jax.effects_barrier()
    first, middle = (float(NOISE.sigma(jnp.float32(t))) for t in (1, 0.6))
    assert len(seen) == made.traits.evaluations == 2
    for sigma, of_step in zip(seen, (first, (first + middle) / 2), strict=True):
        np.testing.assert_allclose(sigma[0::2], of_step, rtol=1e-5)
        np.testing.assert_allclose(sigma[1::2], middle, rtol=1e-5)
    num_changed = np.asarray((after != xt).sum(1))
    assert (after[:, 1] == 2).all()
    assert num_changed[1::2].max() == 2  # One for each evaluation.
    assert num_changed[0::2].max() > 2


@pytest.mark.parametrize("normalize", slow.all_but([False], [False, True]), ids=["plain", "normalised"])
def test_margins_and_redrawn_tokens_are_those_of_the_whole_array(normalize, monkeypatch):
    monkeypatch.setattr(score_draws, "BLOCK_STATES", {"cpu": 160})
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 5)
    graph, rng = graphs.Uniform(vocab_size=300), np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    config = networks.NetworkConfig(
        num_states=300, hidden_size=16, scale_by_sigma=False, normalize=normalize, dtype="float32"
    )
    kernel = 0.7 * normal(16, config.padded_states)
    model = networks.Model(config, {"head_kernel": kernel, "head_bias": jnp.ones(config.padded_states)})
    features, xt = normal(2, 9, 16), jnp.asarray(rng.integers(300, size=(2, 9), dtype=np.int32))
    sigma, is_needed = jnp.array([0.02, 1.0]), jnp.ones((2, 9), bool).at[0, 3].set(False)
    evaluation = steps.Evaluation(features, sigma)
    score = np.exp(np.float64(score_heads.log_score(model, features, xt, sigma)))
    probs = score / score.sum(-1, keepdims=True)
    best = np.sort(probs, axis=-1)
    margins = np.where(is_needed, best[..., -1] - best[..., -2], 0)
    found = jax.jit(lambda: score_draws.margins(model, evaluation, xt, is_needed))()
    np.testing.assert_allclose(found, margins, rtol=1e-4, atol=1e-6)
    # The two least margins of each sequence are redrawn, and nothing else.
    tile = lambda x: jnp.tile(x, (600, *(1,) * (x.ndim - 1)))
    draws = steps.Draws(
        lambda xt, sigma: steps.Evaluation(tile(features), sigma),
        lambda key, *inputs: score_draws.draw(key, model, *inputs),
        lambda *_: xt,
        functools.partial(score_draws.entropies, model),
        functools.partial(score_draws.margins, model),
    )
    jump = lambda total: graph.tweedie_jump(total, tile(xt), tile(sigma))

    @jax.jit
    def redrawn(key_redraw, key):
        made = correctors.find("gibbs:margin:2").redrawing(key_redraw, draws, tile(sigma), jnp.ones(1200, bool))
        return made.draw_fn(key, made.evaluate_fn(tile(xt), 7 * tile(sigma)), tile(xt), tile(is_needed), jump)

    after = np.asarray(redrawn(jax.random.key(3), jax.random.key(4))).reshape(600, 2, 9)
    for row in range(2):
        least = np.argsort(np.where(is_needed, margins, 2)[row])[:2]
        rest = np.setdiff1d(np.arange(9), least)
        assert (after[:, row, rest] == np.asarray(xt)[row, rest]).all()
        for position in least:
            counts = np.bincount(after[:, row, position], minlength=300)
            assert oracles.chi_square_p(counts, probs[row, position]) > 1e-4


@pytest.mark.parametrize("spec", ["", "gibbs:", "gibbs:margin", "gibbs:margin:0", "gibbs:margin:-1", "gibbs:random:2"])
def test_what_is_no_corrector_is_refused(spec):
    with pytest.raises(ValueError, match="is no corrector"):
        correctors.find(spec)
