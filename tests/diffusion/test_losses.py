"""Losses: recorded values and gradients, closed forms, and exact expectations on problems small enough to enumerate."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.conversion import torch_weights
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules, scores, time_laws
from sedd_jax.model import networks, objectives
from tests.support import goldens, oracles, slow


@functools.cache
def recorded_loss(name: str, noise: str) -> dict[str, np.ndarray]:
    """Ours for what loss.npz holds of one network and schedule, and the gradient in the published layout."""
    config, graph, params = goldens.model(name)
    arrays = {key: jnp.asarray(goldens.load("loss.npz")[f"{name}.{noise}.{key}"]) for key in ("t", "x0", "xt")}
    loss = jax.jit(jax.value_and_grad(functools.partial(goldens.mean_loss, name, noise), has_aux=True))
    (_, bounds), gradient = loss(params, arrays["x0"], arrays["xt"], arrays["t"])

    @jax.jit
    def score_entropy(xt, x0, t):
        sigma = goldens.NOISES[noise].sigma(t)
        summary = scores.summarize(goldens.log_score(name, params, xt, sigma), xt, x0)
        return graph.score_entropy(summary, sigma, xt, x0)

    return {
        "loss": bounds.score_entropy,
        "cross_entropy": bounds.cross_entropy,
        "score_entropy": score_entropy(arrays["xt"], arrays["x0"], arrays["t"]),
        "gradient": torch_weights.to_torch(gradient, config),
    }


# Of each network one schedule is quick, since each is a compilation of the whole loss.
DEAR = r"absorb_a\.geo|uniform_a\.loglinear"


@goldens.cases("loss.npz", r"\.(loss|score_entropy)(_true|__f64)?$", slow=DEAR)
def test_recorded(entry):
    name, noise, quantity = entry.name.split(".")
    entry.check(recorded_loss(name, noise)[quantity.removesuffix("_true").removesuffix("__f64")])


@goldens.cases("loss_grads/.*", slow=DEAR)
def test_recorded_gradients(entry):
    name, noise = entry.file.removeprefix("loss_grads/").split(".")[:2]
    entry.check(recorded_loss(name, noise)["gradient"])


@pytest.mark.parametrize("noise", slow.all_but(["loglinear"], ["loglinear", "geo"]))
def test_cross_entropy_bound_is_the_tighter(noise):
    ours = recorded_loss("absorb_a", noise)
    noised = (goldens.load("loss.npz")[f"absorb_a.{noise}.xt"] == 26).any(-1)
    assert (ours["cross_entropy"][noised] < ours["loss"][noised]).all()
    assert (ours["cross_entropy"][noised] > 0).all()
    assert not ours["cross_entropy"][~noised].any()


def zero_head(graph: graphs.Graph) -> losses.SummaryFn:
    """What a fresh network gives: logits of 0, divided by (e^sigma - 1) N."""

    def summary_fn(xt, x0, sigma):
        scale = -jnp.log(jnp.expm1(sigma) * graph.vocab_size)[:, None]
        mean = scale * graph.vocab_size / graph.num_states + 0.0 * xt
        return scores.ScoreSummary(scale + jnp.log(jnp.float32(graph.vocab_size)) + 0.0 * xt, mean, scale + 0.0 * xt)

    return summary_fn


@goldens.cases("init.npz")
def test_fresh_network_loss_of_a_masked_token(entry, golden):
    size = int(entry.name.split(".")[1][1:])
    graph = graphs.Absorbing(vocab_size=size, mask_id=size)
    t = jnp.asarray(golden("init.npz")[f"absorb.n{size}.t"])
    masked = jnp.full((len(t), 1), size)
    process = forward.Process(graph, goldens.NOISES["loglinear"])
    bounds = jax.jit(lambda t: losses.bounds(zero_head(graph), process, jnp.zeros_like(masked), masked, t))(t)
    entry.check(bounds.score_entropy)
    entry.check(bounds.cross_entropy)


def test_fresh_network_loses_log_of_the_vocabulary_a_token():
    """The whole path, from initialisation through noise and times to the loss of a sequence."""
    length, batch = 16, 256
    process = forward.Process(graphs.Absorbing(vocab_size=26, mask_id=26), noise_schedules.LogLinear())
    config = networks.NetworkConfig(
        num_states=27, hidden_size=16, num_layers=1, num_heads=2, cond_dim=8, dtype="float32", dropout=0.0
    )
    params = jax.jit(lambda key: networks.init(key, config))(jax.random.key(0))
    summary_fn = objectives.summary_fn(networks.Model(config, params), process)

    @jax.jit
    def loss(key):
        key_t, key_xt = jax.random.split(key)
        x0 = jnp.zeros((batch, length), jnp.int32)
        t = time_laws.sample_times(key_t, batch).t
        return losses.denoising_score_entropy(key_xt, summary_fn, process, x0, t).score_entropy

    values = np.asarray(loss(jax.random.key(1)))
    expected = (1 - 1e-3) * length * np.log(26)
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(batch)


def exact_loss(kind: str, noise: noise_schedules.NoiseSchedule, p0: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Expected loss of the exact score at each time, enumerating clean and noised sequences, in float64."""
    graph = exact_graph(kind, p0)
    xs = oracles.states(graph, p0.ndim)
    clean = xs[(xs < p0.shape[0]).all(-1)]
    x0, xt = jnp.asarray(np.repeat(clean, len(xs), 0)), jnp.asarray(np.tile(xs, (len(clean), 1)))
    score_fn = oracles.exact_score_fn(graph, p0)
    summary_fn = lambda xt, x0, sigma: scores.summarize(jnp.log(score_fn(xt, sigma)), xt, x0)

    @jax.jit
    def expected(t):
        times = jnp.full(len(xt), t)
        kernel = jnp.take_along_axis(graph.transition_column(x0, noise.sigma(times)), xt[..., None], -1)[..., 0]
        value = losses.bounds(summary_fn, forward.Process(graph, noise), x0, xt, times).score_entropy
        weight = jnp.repeat(jnp.asarray(p0.ravel()), len(xs)) * kernel.prod(-1)
        # What cannot happen has no finite loss, and does not count.
        return jnp.where(weight > 0, weight * value, 0.0).sum()

    return np.asarray(jax.lax.map(expected, jnp.asarray(times)))


def exact_graph(kind: str, p0: np.ndarray) -> graphs.Graph:
    n = p0.shape[0]
    return graphs.Absorbing(vocab_size=n, mask_id=n) if kind == "absorb" else graphs.Uniform(vocab_size=n)


@goldens.cases("exact.npz", r"\.(expected_loss|mean_loss)$")
def test_loss_of_the_exact_score(entry, golden):
    kind, _, _, noise_name, quantity = entry.name.split(".")
    arrays, case = golden("exact.npz"), entry.name.rsplit(".", 1)[0]
    noise, p0 = goldens.NOISES[noise_name], arrays[f"{case}.p0"]
    with jax.enable_x64(True):
        if quantity == "expected_loss":
            entry.check(exact_loss(kind, noise, p0, arrays[f"{case}.t_grid"]))
            return
        # Gauss-Legendre on panels that narrow toward both ends, where the rate and the loss vary most.
        edges = np.array([1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99, 0.997, 0.999, 1.0])
        nodes, weights = np.polynomial.legendre.leggauss(16)
        half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
        times = (middle[:, None] + half[:, None] * nodes).ravel()
        values = exact_loss(kind, noise, p0, times)
        entry.check([(values * (half[:, None] * weights).ravel()).sum() / (1 - 1e-3)])


@goldens.cases("exact.npz", r"\.(p0|entropy|t_grid|score_sigmas|score_table)$")
def test_exact_problems_are_what_they_say(entry, golden):
    """The inputs of the exact problems, and that the oracle the other tests rest on reproduces the recorded scores."""
    arrays, (case, quantity) = golden("exact.npz"), entry.name.rsplit(".", 1)
    p0 = arrays[f"{case}.p0"]
    graph = exact_graph(case.split(".")[0], p0)
    if quantity == "entropy":
        entry.check([-(p0 * np.log(p0)).sum()])
    elif quantity == "score_table":
        entry.check(np.stack([oracles.exact_scores(graph, p0, sigma) for sigma in arrays[f"{case}.score_sigmas"]]))
        with jax.enable_x64(True):
            xs = jnp.asarray(oracles.states(graph, p0.ndim))
            score_fn = oracles.exact_score_fn(graph, p0)
            found = [score_fn(xs, jnp.full(len(xs), sigma)) for sigma in arrays[f"{case}.score_sigmas"]]
        entry.check(jnp.stack(found))
    elif quantity == "p0":
        np.testing.assert_allclose(p0.sum(), 1)
    else:
        assert (entry.expected > 0).all()


def test_pairs_have_opposite_times_and_noise():
    times = time_laws.sample_times(jax.random.key(0), 64, paired=True)
    np.testing.assert_allclose(times.t[0::2] + times.t[1::2], 1 + time_laws.T_MIN, rtol=1e-6)
    spread = np.sort(np.asarray(times.t))
    assert np.diff(spread).max() < 2 / 32
    x0 = jnp.tile(jnp.arange(32)[:, None] % 5, (1, 100)).repeat(2, axis=0)
    process = forward.Process(graphs.Absorbing(vocab_size=5, mask_id=5), noise_schedules.LogLinear())
    xt = losses.noised(jax.random.key(1), process, x0, times, paired=True).xt
    # Log-linear noise masks a share t (1 - 1e-3) of the tokens: a token is a mask in one copy or in the other.
    np.testing.assert_array_equal(xt[0::2] == 5, xt[1::2] != 5)
    alone = losses.noised(jax.random.key(1), process, x0, times).xt
    assert not np.array_equal(alone[0::2] == 5, alone[1::2] != 5)


@pytest.mark.parametrize(
    ("law", "paired"),
    slow.all_but([("learned", True)], [("uniform", False), ("uniform", True), ("bell", True), ("learned", True)]),
)
@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_every_law_and_pairs_have_the_expected_loss_by_enumeration(kind, law, paired, golden):
    arrays = golden("exact.npz")
    case = next(name.removesuffix(".p0") for name in arrays if re.fullmatch(rf"{kind}\..*loglinear\.p0", name))
    p0, expected = arrays[f"{case}.p0"], arrays[f"{case}.mean_loss"].item()
    graph, noise, batch = exact_graph(kind, p0), goldens.NOISES["loglinear"], 256
    clean = jnp.asarray(np.stack(np.unravel_index(np.arange(p0.size), p0.shape), -1))
    one = oracles.exact_score_fn(graph, p0)
    score_fn = jax.vmap(lambda xt, sigma: one(xt[None], sigma[None])[0])
    moments = time_laws.Moments(*jnp.asarray(np.random.default_rng(0).uniform(0, 9, (2, time_laws.NUM_INTERVALS))))

    @jax.jit
    def loss(key):
        key_x0, key_t, key_xt = jax.random.split(key, 3)
        copies = 2 if paired else 1
        x0 = clean[jax.random.choice(key_x0, p0.size, (batch // copies,), p=jnp.asarray(p0.ravel()))]
        times = time_laws.sample_times(key_t, batch, law, moments=moments, paired=paired)
        inputs = losses.noised(key_xt, forward.Process(graph, noise), x0.repeat(copies, axis=0), times, paired=paired)
        summary = scores.summarize(jnp.log(score_fn(inputs.xt, inputs.sigma)), inputs.xt, inputs.x0)
        found = losses.of_positions(graph, summary, inputs.sigma, inputs.xt, inputs.x0).score_entropy
        return (inputs.weights * found.sum(-1)).sum()

    values = np.asarray(jax.lax.map(loss, jax.random.split(jax.random.key(0), 1000)))
    assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5


def test_uniform_graph_has_one_bound():
    ours = recorded_loss("uniform_a", "loglinear")
    np.testing.assert_array_equal(ours["cross_entropy"], ours["loss"])
