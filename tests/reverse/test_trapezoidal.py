"""The theta-trapezoidal sampler: its exact distribution, its order, and its draws by blocks of states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks, score_draws, score_heads, tiles
from sedd_jax.reverse import samplers, steps, time_grids
from sedd_jax.sampling import generate, templates
from tests.support import oracles, slow

N = 3
GRAPHS = {"absorb": graphs.Absorbing(vocab_size=N, mask_id=N), "uniform": graphs.Uniform(vocab_size=N)}
STRONG = np.random.default_rng(0).dirichlet(np.full(N * N, 0.5)).reshape(N, N) * 0.9 + 0.1 / N**2
# So weakly dependent that no rate is extrapolated below 0, which the order takes.
WEAK = np.random.default_rng(0).dirichlet(np.ones(N * N)).reshape(N, N) * 0.25 + 0.75 / N**2
NOISE = noise_schedules.Geometric(sigma_min=1e-2, sigma_max=3.0)
SAMPLER = samplers.SAMPLERS["theta_trapezoidal"]


@functools.cache
def distribution_after(kind, strength, sampler, num_steps):
    """The distribution after steps even in t, from the exact one at t = 1, and its distance to that at the end."""
    graph, p0 = GRAPHS[kind], {"strong": STRONG, "weak": WEAK}[strength]
    xs = oracles.states(graph, p0.ndim)
    t = np.linspace(1, time_grids.T_END, num_steps + 1)
    sigmas = (NOISE.sigma_min ** (1 - t) * NOISE.sigma_max**t).tolist()
    p = oracles.marginal(graph, p0, sigmas[0]).ravel()
    for sigma, after in itertools.pairwise(sigmas):
        if sampler == "theta_trapezoidal":
            p = oracles.trapezoidal_step(graph, p0, p, sigma, after)
            continue
        whole = oracles.leap_time(graph, sigma) - oracles.leap_time(graph, after)
        integrated = whole * oracles.leap_rates(graph, p0, sigma)
        p = sum(p[i] * oracles.leap(graph, xs[i], integrated[i]) for i in np.flatnonzero(p))
    exact = oracles.marginal(graph, p0, sigmas[-1]).ravel()
    return p, np.abs(p - exact).sum() / 2


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_errors_are_of_second_order_where_tokens_depend_weakly(kind):
    errors = {
        name: [distribution_after(kind, "weak", name, n)[1] for n in (16, 32)]
        for name in ("tau_leaping", "theta_trapezoidal")
    }
    slopes = {name: np.log2(coarse / fine) for name, (coarse, fine) in errors.items()}
    assert slopes["tau_leaping"] == pytest.approx(1, abs=0.1)
    assert slopes["theta_trapezoidal"] > 1.85
    # At as many evaluations, in twice as many steps.
    assert errors["theta_trapezoidal"][0] < errors["tau_leaping"][1] / 5


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_where_they_depend_strongly_errors_are_still_smaller(kind):
    assert (
        distribution_after(kind, "strong", "theta_trapezoidal", 8)[1]
        < distribution_after(kind, "strong", "tau_leaping", 16)[1] / 1.5
    )


@pytest.mark.parametrize("strength", ["strong", "weak"])
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_steps_follow_the_definition(kind, strength):
    """Draws after three steps, from the exact distribution at t = 1, against the distribution by enumeration."""
    graph, p0, num_draws = GRAPHS[kind], {"strong": STRONG, "weak": WEAK}[strength], 20_000
    start = oracles.marginal(graph, p0, NOISE.sigma_max).ravel()
    xs = oracles.states(graph, 2)
    xt = jnp.asarray(xs[np.random.default_rng(1).choice(len(xs), size=num_draws, p=start / start.sum())])
    draws, process = oracles.dense_draws(oracles.exact_score_fn(graph, p0), graph), forward.Process(graph, NOISE)
    given = steps.nothing_given(xt.shape)
    after = jax.jit(lambda key, xt: oracles.take_steps(key, SAMPLER, draws, process, given, xt, 0, 3, 3))(
        jax.random.key(0), xt
    )
    counts = np.bincount(np.asarray(after) @ [graph.num_states, 1], minlength=len(xs))
    distribution = distribution_after(kind, strength, "theta_trapezoidal", 3)[0]
    assert oracles.chi_square_p(counts, distribution) > 1e-4


def test_given_tokens_never_change_and_are_always_seen():
    process, seen = forward.Process(GRAPHS["uniform"], NOISE), []
    given = steps.Given(jnp.full((6, 4), 2), jnp.tile(jnp.array([[True, False, False, True]]), (6, 1)))

    def score_fn(xt, sigma):
        jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        return jnp.full((*xt.shape, N), 0.5)

    draws, xt = oracles.dense_draws(score_fn, process.graph), jnp.zeros((6, 4), jnp.int32)
    take = jax.jit(lambda key: oracles.take_steps(key, SAMPLER, draws, process, given, xt, 0, 5, 5))
    out = take(jax.random.key(0))
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
    "uniform, normalised": graphs.Uniform(vocab_size=VOCAB),
}


@pytest.mark.parametrize("draw", slow.all_but(["precise"], sorted(score_draws.DRAWS)))
@pytest.mark.parametrize("name", slow.all_but(["absorb"], sorted(LARGE)))
def test_leaps_by_blocks_follow_the_rates_of_the_whole_array(name, draw, monkeypatch):
    """Two evaluations at two noise levels, the second taken away from the first, some rates below 0."""
    monkeypatch.setattr(score_draws, "BLOCK_STATES", {"cpu": 160})
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 500)
    graph = LARGE[name]
    config = networks.NetworkConfig(
        num_states=graph.num_states,
        hidden_size=WIDTH,
        scale_by_sigma=graph.scales_by_sigma,
        normalize="normalised" in name,
        dtype="float32",
    )
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "head_kernel": 0.5 * jax.random.normal(keys[0], (WIDTH, config.padded_states)),
        "head_bias": 0.5 * jax.random.normal(keys[1], (config.padded_states,)),
    }
    one, other = (jnp.tile(jax.random.normal(key, (1, 3, WIDTH)), (BATCH, 1, 1)) for key in keys[2:])
    model = networks.Model(config, params)
    masked = graph.mask_id if graph.has_mask else 5
    xt = jnp.tile(jnp.array([[masked, masked, 7]]), (BATCH, 1))
    sigmas = jnp.full(BATCH, 0.7), jnp.full(BATCH, 0.5)
    scales = {"uniform": (6e-4, -2.4e-4), "uniform, normalised": (1.5e-3, -6e-4)}.get(name, (0.2, -0.05))
    slopes = [jnp.full(xt.shape, scale) for scale in scales]
    is_movable = graph.is_noise(xt).at[:, 1].set(False)
    evaluations = [steps.Evaluation(*pair) for pair in zip((one, other), sigmas, strict=True)]
    rates = [steps.Rates(*pair) for pair in zip(evaluations, slopes, strict=True)]
    drawn = jax.jit(lambda key, rates: score_draws.leap(key, model, rates, xt, is_movable, draw=draw))
    tokens = np.concatenate([drawn(key, rates) for key in jax.random.split(jax.random.key(1), 25)])
    score = lambda f, sigma: np.exp(np.float64(score_heads.log_score(model, f[:1], xt[:1], sigma[:1])[0]))
    total = sum(np.float64(one.slope[0])[:, None] * score(*one.evaluation) for one in rates)
    assert (total < 0).any()
    for position, movable in enumerate(np.asarray(is_movable[0])):
        if not movable:
            assert (tokens[:, position] == xt[0, position]).all()
            continue
        to = np.where(np.arange(graph.num_states) == xt[0, position], 0, np.maximum(total[position], 0))
        distribution = to * -np.expm1(-to.sum()) / to.sum()
        distribution[xt[0, position]] = np.exp(-to.sum())
        assert 0.05 < distribution[xt[0, position]] < 0.95
        assert oracles.chi_square_p(np.bincount(tokens[:, position], minlength=graph.num_states), distribution) > 1e-4


@pytest.mark.slow
def test_a_run_is_sampled_in_two_evaluations_a_step(code_run):
    run = runs.load(code_run)
    opened, sampling = run.restore(), run.sampling(sampler="theta_trapezoidal", num_steps=3, num_samples=8)
    with opened.on_devices():
        drawn = generate.draw_samples(opened, templates.parse(run, "a = {9}"), sampling, seed=0)
    assert {(one.nfe, one.num_steps, one.sampler) for one in drawn} == {(7, 3, "theta_trapezoidal")}
    for one in drawn:
        assert run.graph.mask_id not in one.tokens
        assert one.text.startswith("a = ")
