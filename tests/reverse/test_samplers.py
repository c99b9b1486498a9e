"""Samplers: recorded steps and runs, and exact output distributions by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.reverse import samplers, steps, time_grids
from tests.support import goldens, oracles, slow

PUBLISHED = {"euler": "euler", "analytic": "tweedie"}
JUMPS = {"euler": steps.euler, "tau_leaping": steps.tau_leaping, "tweedie": steps.tweedie}
P0 = {
    1: np.array([0.4, 0.05, 0.3, 0.2, 0.05]),
    2: np.random.default_rng(0).dirichlet(np.full(25, 0.5)).reshape(5, 5) * 0.95 + 0.05 / 25,
}
PROCESSES = {
    "absorb": forward.Process(graphs.Absorbing(vocab_size=5, mask_id=5), noise_schedules.LogLinear()),
    "uniform": forward.Process(graphs.Uniform(vocab_size=5), noise_schedules.Geometric()),
}
# Every sampler of the table on every graph that it takes.
SAMPLED = [
    (kind, sampler)
    for kind, process in sorted(PROCESSES.items())
    for sampler in sorted(samplers.SAMPLERS)
    if process.graph.has_mask or not samplers.SAMPLERS[sampler].traits.needs_mask
]
# The recording adds and subtracts e^20 here, which leaves 1e-7 of rounding in float64, far above the tolerance of 1e-9.
ROUNDED = "absorb.n3.L2.geo.analytic.N1.before_denoise"
# A step that removes much noise multiplies the score by e^delta_sigma. Where 4 steps take sigma from 20, what float32
# rounds off an exact score outgrows the weights, so draws are compared at a smaller noise.
MILD = noise_schedules.Geometric(sigma_max=6.0)


def step_weights(process, method, score, xt, t, dt):
    """Weights of one step by its published name, `denoise` included, without the mask's column there."""
    if method != "denoise":
        return dense_weights(PUBLISHED[method], process, score, xt, t, dt)
    return dense_weights("denoise", process, score, xt, t, dt)[..., : process.graph.vocab_size]


def dense_weights(jump, process, score, xt, t, dt):
    """Weights of one step over all states, [B, L, V]."""
    if jump == "denoise":
        last = lambda total: process.graph.denoise_jump(total, xt, process.noise.sigma(t))
        return oracles.jump_weights(last, score, xt)
    dt = jnp.broadcast_to(dt, t.shape)
    return oracles.jump_weights(lambda total: JUMPS[jump](process, total, xt, t, dt), score, xt)


def normalised(weights: np.ndarray) -> np.ndarray:
    probs = np.maximum(np.asarray(weights, float), 0)
    return probs / probs.sum(-1, keepdims=True)


def effective(entry: goldens.Entry, weights: jax.Array) -> np.ndarray:
    """Weights in the published scale: denoising from the mask has another factor there, which no draw can see."""
    if ".denoise_" in entry.name:
        row = np.abs(entry.expected).sum(-1, keepdims=True) if entry.name.endswith("_probs") else 1.0
        return np.asarray(weights, float) / np.abs(weights).sum(-1, keepdims=True) * row
    return np.asarray(weights, float)


@goldens.cases("sampler.npz", r"^given\.")
def test_recorded_steps_from_given_scores(entry, golden):
    _, kind, noise, quantity = entry.name.split(".")
    case, method = entry.name.rsplit(".", 1)[0], quantity.split("_")[0]
    xt, t, dt, score = (jnp.asarray(golden("sampler.npz")[f"{case}.{name}"]) for name in ("x", "t", "dt", "score"))
    graph = graphs.Absorbing(vocab_size=9, mask_id=9) if kind == "absorb" else graphs.Uniform(vocab_size=9)
    weights = step_weights(forward.Process(graph, goldens.NOISES[noise]), method, score, xt, t[:, 0], dt[0])
    entry.check(normalised(weights) if quantity.endswith("_dist") else effective(entry, weights))


@functools.cache
def model_score(name: str):
    """The recorded network as a compiled score function."""
    params = goldens.model(name)[2]
    return jax.jit(lambda xt, sigma: jnp.exp(goldens.log_score(name, params, xt, sigma)))


@goldens.cases("sampler.npz", r"^model\.")
def test_recorded_steps_of_a_network(entry, golden):
    _, name, noise, quantity = entry.name.split(".")
    case = entry.name.rsplit(".", 1)[0]
    xt, t, dt = (jnp.asarray(golden("sampler.npz")[f"{case}.{part}"]) for part in ("x", "t", "dt"))
    process, t = forward.Process(goldens.model(name)[1], goldens.NOISES[noise]), t[:, 0]
    score = model_score(name)(xt, process.noise.sigma(t))
    entry.check(effective(entry, step_weights(process, quantity.split("_")[0], score, xt, t, dt[0])))


@functools.cache
def recorded_run(case: str) -> dict[str, np.ndarray]:
    """Ours for a recorded run with infilling, drawing the published way from the recorded uniforms."""
    _, name, noise_name, method = case.split(".")
    arrays = {
        key.removeprefix(f"{case}."): x for key, x in goldens.load("sampler.npz").items() if key.startswith(f"{case}.")
    }
    process, score_fn = forward.Process(goldens.model(name)[1], goldens.NOISES[noise_name]), model_score(name)
    num_steps = len(arrays["timesteps"]) - 1
    xt = jnp.asarray(arrays["x"][0])
    tokens = np.zeros(xt.shape, np.int32)
    tokens[:, arrays["infill_positions"]] = arrays["infill_ids"]
    is_given = np.isin(np.arange(xt.shape[1]), arrays["infill_positions"]) & np.ones(xt.shape, bool)
    given = steps.Given(jnp.asarray(tokens), jnp.asarray(is_given))
    sampler = PUBLISHED[method.rstrip("0123456789")]

    def draws_from(uniforms):
        """As published: every position draws, given ones too, which are clamped afterwards."""
        draw = lambda key, weights: jnp.argmax(weights / (1e-10 - jnp.log(uniforms + 1e-10)), axis=-1)
        draws = oracles.dense_draws(score_fn, process.graph, draw)
        return draws._replace(
            draw_fn=lambda key, evaluation, xt, _, jump_fn: draws.draw_fn(
                key, evaluation, xt, jnp.ones(xt.shape, bool), jump_fn
            )
        )

    @jax.jit
    def step(xt, i, uniforms):
        draws = draws_from(uniforms)
        return oracles.take_steps(
            jax.random.key(0), samplers.SAMPLERS[sampler], draws, process, given, xt, i, i + 1, num_steps
        )

    states = [xt]
    for i, uniforms in enumerate(arrays["uniforms"]):
        states.append(step(states[-1], i, jnp.asarray(uniforms)))
    # Where the mask's column was left out of the last draw, its weight is 0 here.
    missing = process.graph.num_states - arrays["uniforms_denoise"].shape[-1]
    last = jnp.pad(jnp.asarray(arrays["uniforms_denoise"]), [(0, 0), (0, 0), (0, missing)], constant_values=0.5)
    out = steps.denoise(jax.random.key(1), draws_from(last), process, given, states[-1])
    first, start = given.clamp(xt), jnp.ones(len(xt))
    dt = jnp.float32((1 - time_grids.T_END) / num_steps)
    weights = dense_weights(sampler, process, score_fn(first, process.noise.sigma(start)), first, start, dt)
    return {"x": np.stack(states), "out": np.asarray(out), "probs_first": np.asarray(weights)}


@goldens.cases("sampler.npz", r"^run\.")
def test_recorded_runs(entry):
    case, quantity = entry.name.rsplit(".", 1)
    entry.check(recorded_run(case)[quantity])


def propagate(process, p0, jump):
    """(num_steps) -> distributions before and after `denoise`, by our weights over all states; compiled once."""
    graph, noise = process.graph, process.noise
    xs = jnp.asarray(oracles.states(graph, p0.ndim))
    score_fn = oracles.exact_score_fn(graph, p0)
    start = (xs == graph.num_states - 1).all(-1) * 1.0 if graph.has_mask else jnp.full(len(xs), 1 / len(xs))

    def move(weights, p):
        # What cannot be reached has a score of 0/0, and no share in the distribution.
        weights = jnp.where(p[:, None, None] > 0, weights, 1.0)
        probs = jnp.maximum(weights, 0.0)
        probs = probs / probs.sum(-1, keepdims=True)
        joint = probs[:, 0]
        for position in range(1, p0.ndim):
            joint = (joint[:, :, None] * probs[:, position, None]).reshape(len(xs), -1)
        return p @ joint

    @jax.jit
    def distributions(num_steps):
        dt = (1 - time_grids.T_END) / num_steps

        def step(i, p):
            t = jnp.full(len(xs), 1 - i * dt)
            return move(dense_weights(jump, process, score_fn(xs, noise.sigma(t)), xs, t, dt), p)

        before = jax.lax.fori_loop(0, num_steps, step, start)
        end = jnp.full(len(xs), time_grids.T_END)
        last = dense_weights("denoise", process, score_fn(xs, noise.sigma(end)), xs, end, 0.0)
        return before, move(last, before)

    return distributions


@functools.cache
def recorded_distributions(case: str, method: str):
    kind, size, _, noise = case.split(".")
    n = int(size[1:])
    graph = graphs.Absorbing(vocab_size=n, mask_id=n) if kind == "absorb" else graphs.Uniform(vocab_size=n)
    process, p0 = forward.Process(graph, goldens.NOISES[noise]), goldens.load("exact.npz")[f"{case}.p0"]
    return graph, propagate(process, p0, PUBLISHED[method])


@goldens.cases("exact.npz", r"\.(final|before_denoise)$")
def test_recorded_distributions(entry):
    *case, method, number, quantity = entry.name.split(".")
    with jax.enable_x64(True):
        graph, distributions = recorded_distributions(".".join(case), method)
        before, final = (
            distribution.reshape((graph.num_states,) * 2) for distribution in distributions(int(number[1:]))
        )
    if entry.name == ROUNDED:
        np.testing.assert_allclose(
            before, one_step_distribution(goldens.load("exact.npz")[".".join((*case, "p0"))]), rtol=1e-9
        )
        np.testing.assert_allclose(before, entry.expected, atol=1e-7)
        return
    entry.check(before if quantity == "before_denoise" else final[: graph.vocab_size, : graph.vocab_size])


def one_step_distribution(p0: np.ndarray) -> np.ndarray:
    """Distribution after one Tweedie step from all masks over the whole of `geo`: every position moves on its own."""
    sigma_end = 1e-4 ** (1 - time_grids.T_END) * 20.0**time_grids.T_END
    mask = (np.expm1(-sigma_end)) / np.expm1(-20.0)
    return np.outer(*(np.append(p0.sum(axis) * (1 - mask), mask) for axis in (1, 0)))


@pytest.mark.parametrize(
    ("kind", "sampler"),
    slow.all_but(
        [
            ("absorb", "euler"),
            ("absorb", "first_hitting"),
            ("absorb", "tweedie"),
            ("uniform", "tau_leaping"),
            ("uniform", "theta_trapezoidal"),
        ],
        SAMPLED,
    ),
)
@pytest.mark.parametrize("length", slow.all_but([2], [1, 2]))
def test_draws_follow_the_exact_distribution(kind, sampler, length):
    """With the exact score and few steps, draws have the distribution that dense matrices give."""
    graph, noise = PROCESSES[kind].graph, MILD if kind == "uniform" else PROCESSES[kind].noise
    given = steps.nothing_given((30_000, length))
    tokens = jitted_sample(forward.Process(graph, noise), P0[length], sampler, given, 4)(jax.random.key(length))
    distribution = oracles.sampler_distribution(graph, noise, P0[length], sampler, 4)
    outcomes = np.ravel_multi_index(tuple(np.asarray(tokens).T), (graph.num_states,) * length)
    assert oracles.chi_square_p(np.bincount(outcomes, minlength=len(distribution)), distribution) > 1e-4


def jitted_sample(process, p0, sampler, given, num_steps):
    """(key) -> tokens, with the exact score."""
    draws = oracles.dense_draws(oracles.exact_score_fn(process.graph, p0), process.graph)
    return jax.jit(lambda key: oracles.sample(key, samplers.SAMPLERS[sampler], draws, process, given, num_steps))


@pytest.mark.parametrize("jump", sorted(JUMPS))
@pytest.mark.parametrize("kind", sorted(PROCESSES))
def test_errors_are_of_first_order(kind, jump):
    """Total variation to the data, against steps on a log scale: slope 1."""
    exact = oracles.embed(PROCESSES[kind].graph, P0[2]).ravel()
    with jax.enable_x64(True):
        distributions = propagate(PROCESSES[kind], P0[2], jump)
        distances = [np.abs(distributions(n)[1] - exact).sum() / 2 for n in (8, 64, 512)]
    assert distances[2] < distances[1] < distances[0]
    assert np.log(distances[1] / distances[2]) / np.log(8) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", sorted(PROCESSES))
def test_tweedie_of_one_token_is_exact_at_any_number_of_steps(kind):
    with jax.enable_x64(True):
        distributions = propagate(PROCESSES[kind], P0[1], "tweedie")
        for num_steps in (1, 2, 7):
            # The uniform graph starts e^-sigma_max from its limit.
            exact = oracles.embed(PROCESSES[kind].graph, P0[1])
            np.testing.assert_allclose(distributions(num_steps)[1], exact, atol=1e-7)


def test_euler_and_tau_leaping_differ():
    graph, noise = PROCESSES["absorb"].graph, PROCESSES["absorb"].noise
    distributions = [
        oracles.sampler_distribution(graph, noise, P0[2], sampler, 4) for sampler in ("euler", "tau_leaping")
    ]
    assert np.abs(distributions[0] - distributions[1]).sum() > 1e-3


@pytest.fixture(
    scope="module", params=slow.all_but(["first_hitting", "theta_trapezoidal", "tweedie"], sorted(samplers.SAMPLERS))
)
def generator(request):
    """A compiled sampler of a fixed arbitrary score, all of it and some of its steps, and how often it was traced."""
    process = forward.Process(graphs.Absorbing(vocab_size=20, mask_id=7), noise_schedules.LogLinear())
    sampler, traces = samplers.SAMPLERS[request.param], []

    def score_fn(xt, sigma):
        traces.append(None)
        angle = xt[..., None] + jnp.arange(21, dtype=jnp.float32)[None, None] * jnp.arange(12.0)[None, :, None]
        score = jnp.exp(jnp.sin(angle)) / (20 * jnp.expm1(sigma)[:, None, None])
        return jnp.where(xt[..., None] == jnp.arange(21)[None, None], 1.0, score)

    draws = oracles.dense_draws(score_fn, process.graph)
    sample = jax.jit(lambda key, given, num_steps: oracles.sample(key, sampler, draws, process, given, num_steps))
    take = jax.jit(
        lambda key, given, xt, start, stop: oracles.take_steps(key, sampler, draws, process, given, xt, start, stop, 16)
    )
    return sample, take, traces


def test_any_number_of_steps_is_one_compilation(generator):
    sample, _, traces = generator
    given = steps.nothing_given((4, 12))
    sample(jax.random.key(0), given, 3)
    count = len(traces)
    outputs = [np.asarray(sample(jax.random.key(0), given, n)) for n in (1, 3, 16)]
    assert len(traces) == count
    assert all(((x != 7) & (x >= 0) & (x < 21)).all() for x in outputs)


def test_steps_in_two_calls_equal_one(generator):
    _, take, _ = generator
    given, masks = steps.nothing_given((4, 12)), jnp.full((4, 12), 7)
    whole = np.asarray(take(jax.random.key(1), given, masks, 0, 16))
    halves = take(jax.random.key(1), given, take(jax.random.key(1), given, masks, 0, 5), 5, 16)
    np.testing.assert_array_equal(whole, halves)
    assert (whole != masks).any()
    assert (whole != take(jax.random.key(2), given, masks, 0, 16)).any()


def test_given_tokens_never_change(generator):
    sample, _, _ = generator
    tokens = np.random.default_rng(0).integers(0, 7, (4, 12), np.int32)
    is_given = np.arange(48).reshape(4, 12) % 3 == 0
    out = np.asarray(sample(jax.random.key(1), steps.Given(jnp.asarray(tokens), jnp.asarray(is_given)), 16))
    np.testing.assert_array_equal(out[is_given], tokens[is_given])
    assert (out != 7).all()


@pytest.mark.parametrize(
    ("kind", "name"),
    slow.all_but([("absorb", "first_hitting"), ("absorb", "tweedie"), ("uniform", "theta_trapezoidal")], SAMPLED),
)
def test_the_network_always_sees_given_tokens_clean(kind, name):
    process, sampler = PROCESSES[kind], samplers.SAMPLERS[name]
    tokens = jnp.tile(jnp.array([[1, 4, 2, 3]]), (8, 1))
    given = steps.Given(tokens, jnp.tile(jnp.array([[True, False, True, False]]), (8, 1)))
    seen = []

    def score_fn(xt, sigma):
        jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        return jnp.where(xt[..., None] == jnp.arange(process.graph.num_states)[None, None], 1.0, 0.5)

    num_steps = sampler.num_steps(4, 2)
    draws = oracles.dense_draws(score_fn, process.graph)
    jax.jit(lambda key: oracles.sample(key, sampler, draws, process, given, num_steps))(jax.random.key(0))
    jax.effects_barrier()
    assert len(seen) == sampler.traits.evaluations * num_steps + 1
    for xt in seen:
        np.testing.assert_array_equal(xt[given.is_given], tokens[given.is_given])


@pytest.mark.parametrize("name", ["theta_trapezoidal", "entropy_bound"])
def test_noise_is_that_of_the_schedule_where_almost_all_is_masked_at_first(name):
    """Where sigma is 20, the probability of a mask is 1 in float32; noise must not follow from it alone."""
    graph, noise, sampler = PROCESSES["absorb"].graph, noise_schedules.Geometric(), samplers.SAMPLERS[name]
    seen, slopes = [], []
    even = lambda xt, sigma: jnp.where(xt[..., None] == jnp.arange(graph.num_states)[None, None], 1.0, 0.2)
    own = oracles.dense_draws(even, graph)

    def evaluate(xt, sigma):
        jax.debug.callback(lambda sigma: seen.append(np.asarray(sigma)), sigma)
        return own.evaluate_fn(xt, sigma)

    def leap(key, rates, xt, is_movable):
        jax.debug.callback(lambda *x: slopes.append(np.stack(x)), *(one.slope for one in rates))
        return own.leap_fn(key, rates, xt, is_movable)

    draws, process = own._replace(evaluate_fn=evaluate, leap_fn=leap), forward.Process(graph, noise)
    given = steps.nothing_given((64, 4))
    num_steps = sampler.num_steps(128, 4)
    jax.jit(lambda key: oracles.sample(key, sampler, draws, process, given, num_steps))(jax.random.key(0))
    jax.effects_barrier()
    assert np.isfinite(seen).all()
    assert np.max(seen) <= 20.001
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_leap_time_is_that_of_its_definition_at_any_noise():
    graph, sigma = PROCESSES["absorb"].graph, np.geomspace(1e-5, 80, 200)
    found = graph.leap_time(jnp.asarray(sigma, jnp.float32))
    exact = np.where(sigma > 1, np.log1p(-np.exp(-sigma)), np.log(-np.expm1(-sigma)))
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    np.testing.assert_allclose(graph.sigma_at(found), sigma, rtol=1e-4)


@pytest.mark.parametrize("sampler", slow.all_but(["tweedie", "first_hitting"], sorted(samplers.SAMPLERS)))
def test_infilling_with_the_exact_score_follows_the_conditional_distribution(sampler):
    """One gap: its token has the same distribution whenever it is drawn."""
    given = steps.Given(jnp.full((20_000, 2), 3), jnp.tile(jnp.array([[True, False]]), (20_000, 1)))
    sample = jitted_sample(PROCESSES["absorb"], P0[2], sampler, given, 8)
    counts = np.bincount(sample(jax.random.key(0))[:, 1], minlength=5)
    assert oracles.chi_square_p(counts, P0[2][3] / P0[2][3].sum()) > 1e-4


@pytest.mark.parametrize("jump", [*sorted(JUMPS), "denoise"])
@pytest.mark.parametrize("noise", [noise_schedules.LogLinear(), noise_schedules.Geometric()], ids=str)
@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_weights_are_finite_and_drawable_at_full_vocabulary(kind, noise, jump):
    n = 50257
    graph = graphs.Absorbing(vocab_size=n, mask_id=n) if kind == "absorb" else graphs.Uniform(vocab_size=n)
    t = jnp.array([time_grids.T_END, 1e-3, 0.1, 0.5, 0.999, 1.0])
    xt = jnp.tile(jnp.array([[n - 1 if kind == "uniform" else n, 3]]), (len(t), 1))

    @jax.jit
    def weights(log_score, dt):
        score = jnp.exp(log_score)
        if kind == "absorb":
            score = score / (n * jnp.expm1(noise.sigma(t))[:, None, None])
        score = jnp.where(xt[..., None] == jnp.arange(graph.num_states)[None, None], 1.0, score)
        return dense_weights(jump, forward.Process(graph, noise), score, xt, jnp.maximum(t, dt), dt)

    log_score = np.random.default_rng(0).normal(size=(len(t), 2, graph.num_states)).astype(np.float32)
    for dt in (1e-3, 1 / 8):
        value = np.asarray(weights(log_score, jnp.float32(dt)))
        assert np.isfinite(value).all()
        assert (value.max(-1) > 0).all()


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS))
def test_a_sampler_takes_a_grid_where_it_says_so_and_corrector_steps(name):
    listed = samplers.SAMPLERS[name]
    made = samplers.make(name, grid="sigma", corrector_steps=2)
    assert isinstance(made, samplers.Sampler)
    assert (made.traits, made.corrector_steps) == (listed.traits, 2)
    assert getattr(made, "grid", None) == ("sigma" if listed.traits.takes_grid else None)
    assert samplers.make(name) == listed
