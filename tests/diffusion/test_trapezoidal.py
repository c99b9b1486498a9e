"""The theta-trapezoidal sampler: the law that its definition gives, its order, and its draws by blocks of states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.diffusion import graphs, noise_schedules, samplers, time_grids, trapezoidal
from sedd_jax.model import networks, score_draws, score_heads, tiles
from sedd_jax.runtime import sharding
from sedd_jax.sampling import generate, templates
from tests.support import oracles

N = 3
GRAPHS = {"absorb": graphs.Absorbing(vocab_size=N, mask_id=N), "uniform": graphs.Uniform(vocab_size=N)}
STRONG = np.random.default_rng(0).dirichlet(np.full(N * N, 0.5)).reshape(N, N) * 0.9 + 0.1 / N**2
# So weakly dependent that no rate is extrapolated below 0, which the order takes.
WEAK = np.random.default_rng(0).dirichlet(np.ones(N * N)).reshape(N, N) * 0.25 + 0.75 / N**2
NOISE = noise_schedules.Geometric(sigma_min=1e-2, sigma_max=3.0)


def own_time(graph, sigma):
    return np.log(-np.expm1(-sigma)) if isinstance(graph, graphs.Absorbing) else sigma


def rates(graph, p0, sigma):
    """Rates of the reverse process in its own time from each state at each position to each token, [V^L, L, V]."""
    table = oracles.exact_scores(graph, p0, sigma)
    xs = oracles.states(graph, p0.ndim)
    speed = np.expm1(sigma) if isinstance(graph, graphs.Absorbing) else 1.0
    found = np.zeros_like(table)
    for i, x in enumerate(xs):
        for position, token in enumerate(x):
            found[i, position] = speed * oracles.rate_matrix(graph)[token] * table[i, position]
            found[i, position, token] = 0
    return found


def leap(graph, x, integrated):
    """Law over all states after a leap from x with integrated rates [L, V] that are frozen and cut at 0."""
    law = np.ones(1)
    for token, to in zip(x, np.maximum(integrated, 0), strict=True):
        to = np.where(np.arange(graph.num_states) == token, 0, to)
        own = to * -np.expm1(-to.sum()) / max(to.sum(), 1e-300)
        own[token] = np.exp(-to.sum())
        law = np.multiply.outer(law, own).ravel()
    return law


@functools.cache
def law_after(kind, strength, sampler, num_steps):
    """The law after steps even in t, from the exact law at t = 1, and its distance to the exact law at the end."""
    graph, p0 = GRAPHS[kind], {"strong": STRONG, "weak": WEAK}[strength]
    xs = oracles.states(graph, p0.ndim)
    t = np.linspace(1, time_grids.T_END, num_steps + 1)
    sigmas = (NOISE.sigma_min ** (1 - t) * NOISE.sigma_max**t).tolist()
    p = oracles.marginal(graph, p0, sigmas[0]).ravel()
    for sigma, after in itertools.pairwise(sigmas):
        start, stop = own_time(graph, sigma), own_time(graph, after)
        first, q = rates(graph, p0, sigma), np.zeros_like(p)
        middle = (start + stop) / 2
        second = rates(graph, p0, -np.log1p(-np.exp(middle)) if kind == "absorb" else middle)
        for i in np.flatnonzero(p):
            if sampler == "tau_leaping":
                q += p[i] * leap(graph, xs[i], (start - stop) * first[i])
                continue
            half = (start - stop) / 2
            for j, probability in enumerate(leap(graph, xs[i], half * first[i])):
                if probability > 0:
                    back = np.where((xs[i] == xs[j])[:, None], first[i], 0)
                    q += p[i] * probability * leap(graph, xs[j], half * (2 * second[j] - back))
        p = q
    exact = oracles.marginal(graph, p0, sigmas[-1]).ravel()
    return p, np.abs(p - exact).sum() / 2


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_errors_are_of_second_order_where_tokens_depend_weakly(kind):
    errors = {
        name: [law_after(kind, "weak", name, n)[1] for n in (16, 32)] for name in ("tau_leaping", trapezoidal.NAME)
    }
    slopes = {name: np.log2(coarse / fine) for name, (coarse, fine) in errors.items()}
    assert slopes["tau_leaping"] == pytest.approx(1, abs=0.1)
    assert slopes[trapezoidal.NAME] > 1.85
    # At as many evaluations, in twice as many steps.
    assert errors[trapezoidal.NAME][0] < errors["tau_leaping"][1] / 5


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_where_they_depend_strongly_errors_are_still_smaller(kind):
    assert law_after(kind, "strong", trapezoidal.NAME, 8)[1] < law_after(kind, "strong", "tau_leaping", 16)[1] / 1.5


def dense_fns(graph, p0):
    """Evaluations are exact scores, leaps draw from the whole array."""
    exact = oracles.exact_score_fn(graph, p0)
    return lambda xt, sigma: jnp.nan_to_num(exact(xt, sigma), posinf=0.0), oracles.dense_leap(graph)


@pytest.mark.parametrize("strength", ["strong", "weak"])
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_steps_follow_the_definition(kind, strength):
    """Draws after three steps, from the exact law at t = 1, against the law by enumeration."""
    graph, p0, draws = GRAPHS[kind], {"strong": STRONG, "weak": WEAK}[strength], 20_000
    start = oracles.marginal(graph, p0, NOISE.sigma_max).ravel()
    xs = oracles.states(graph, 2)
    xt = jnp.asarray(xs[np.random.default_rng(1).choice(len(xs), size=draws, p=start / start.sum())])
    evaluate, leap = dense_fns(graph, p0)
    given = samplers.nothing_given(xt.shape)
    predict = trapezoidal.predictor(evaluate, leap, graph, NOISE, given)
    after = jax.jit(lambda key, xt: samplers.reverse_steps(key, predict, graph, NOISE, given, xt, 0, 3, 3))(
        jax.random.key(0), xt
    )
    counts = np.bincount(np.asarray(after) @ [graph.num_states, 1], minlength=len(xs))
    law = law_after(kind, strength, trapezoidal.NAME, 3)[0]
    assert oracles.chi_square_p(counts, law) > 1e-4


def test_given_tokens_never_change_and_are_always_seen():
    graph, seen = GRAPHS["uniform"], []
    given = samplers.Given(jnp.full((6, 4), 2), jnp.tile(jnp.array([[True, False, False, True]]), (6, 1)))

    def evaluate(xt, sigma):
        jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        return jnp.full((*xt.shape, N), 0.5)

    _, leap = dense_fns(graph, STRONG)
    xt = jnp.zeros((6, 4), jnp.int32)
    predict = trapezoidal.predictor(evaluate, leap, graph, NOISE, given)
    out = samplers.reverse_steps(jax.random.key(0), predict, graph, NOISE, given, xt, 0, 5, 5)
    jax.effects_barrier()
    assert len(seen) == 10
    for state in (*seen, np.asarray(out)):
        assert (state[:, [0, 3]] == 2).all()
    assert (np.asarray(out)[:, 1:3] != 0).any()


WIDTH, VOCAB, BATCH = 16, 300, 400
LARGE = {
    "absorb": graphs.Absorbing(vocab_size=VOCAB, mask_id=VOCAB),
    "mask inside": graphs.Absorbing(vocab_size=VOCAB, mask_id=103),
    "uniform": graphs.Uniform(vocab_size=VOCAB),
}


@pytest.mark.parametrize("draw", sorted(score_draws.DRAWS))
@pytest.mark.parametrize("name", sorted(LARGE))
def test_leaps_by_blocks_follow_the_rates_of_the_whole_array(name, draw, monkeypatch):
    """Two evaluations at two noise levels, the second taken away from the first, some rates below 0."""
    monkeypatch.setattr(score_draws, "BLOCK_STATES", 160)
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 500)
    graph = LARGE[name]
    scaled = isinstance(graph, graphs.Absorbing)
    config = networks.NetworkConfig(
        num_states=graph.num_states, hidden_size=WIDTH, scale_by_sigma=scaled, dtype="float32"
    )
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "head_kernel": 0.5 * jax.random.normal(keys[0], (WIDTH, config.padded_states)),
        "head_bias": 0.5 * jax.random.normal(keys[1], (config.padded_states,)),
    }
    one, other = (jnp.tile(jax.random.normal(key, (1, 3, WIDTH)), (BATCH, 1, 1)) for key in keys[2:])
    masked = graph.mask_id if scaled else 5
    xt = jnp.tile(jnp.array([[masked, masked, 7]]), (BATCH, 1))
    sigmas = jnp.full(BATCH, 0.7), jnp.full(BATCH, 0.5)
    scales = (6e-4, -2.4e-4) if name == "uniform" else (0.2, -0.05)
    slopes = [jnp.full(xt.shape, scale) for scale in scales]
    is_movable = graph.is_noise(xt).at[:, 1].set(False)
    evaluations = list(zip((one, other), sigmas, slopes, strict=True))
    drawn = jax.jit(
        lambda key, evaluations: score_draws.leap(key, config, params, evaluations, xt, is_movable, draw=draw)
    )
    tokens = np.concatenate([drawn(key, evaluations) for key in jax.random.split(jax.random.key(1), 25)])
    score = lambda f, sigma: np.exp(np.float64(score_heads.log_score(config, params, f[:1], xt[:1], sigma[:1])[0]))
    total = sum(np.float64(slope[0])[:, None] * score(f, sigma) for f, sigma, slope in evaluations)
    assert (total < 0).any()
    for position, movable in enumerate(np.asarray(is_movable[0])):
        if not movable:
            assert (tokens[:, position] == xt[0, position]).all()
            continue
        to = np.where(np.arange(graph.num_states) == xt[0, position], 0, np.maximum(total[position], 0))
        law = to * -np.expm1(-to.sum()) / to.sum()
        law[xt[0, position]] = np.exp(-to.sum())
        assert 0.05 < law[xt[0, position]] < 0.95
        assert oracles.chi_square_p(np.bincount(tokens[:, position], minlength=graph.num_states), law) > 1e-4


def test_a_run_is_sampled_in_two_evaluations_a_step(code_run):
    run = runs.load(code_run)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    _, params = run.ema_params(mesh)
    sampling = generate.sampling_of(run, sampler=trapezoidal.NAME, num_steps=3, num_samples=8)
    with jax.set_mesh(mesh):
        drawn = generate.draw_samples(run, params, templates.parse(run, "a = {9}"), sampling, seed=0, step=0)
    assert {(one.nfe, one.num_steps, one.sampler) for one in drawn} == {(7, 3, trapezoidal.NAME)}
    for one in drawn:
        assert run.graph.mask_id not in one.tokens
        assert one.text.startswith("a = ")
