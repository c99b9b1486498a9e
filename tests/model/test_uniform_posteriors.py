"""`network.normalize` for the uniform graph: the softmax is a clean token's distribution given all other positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import config as configs
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules, scores
from sedd_jax.model import networks, score_heads
from sedd_jax.runtime import errors
from tests.support import oracles, slow

NOISE = noise_schedules.Geometric(sigma_min=1e-4, sigma_max=20.0)
N, P0 = 4, np.random.default_rng(0).dirichlet(np.full(16, 0.4)).reshape(4, 4)
GRAPH = graphs.Uniform(vocab_size=N)


def head_of(logits):
    """A network whose head gives the logits of each row, [n, V], and the features that ask for them, [n, 1, n]."""
    num_rows, num_states = logits.shape
    config = networks.NetworkConfig(
        num_states=num_states, hidden_size=num_rows, scale_by_sigma=False, normalize=True, dtype="float32"
    )
    kernel = np.zeros((num_rows, config.padded_states), np.float32)
    kernel[:, :num_states] = logits
    model = networks.Model(config, {"head_kernel": jnp.asarray(kernel), "head_bias": jnp.zeros(config.padded_states)})
    return model, jnp.eye(num_rows)[:, None]


def posteriors(sigma):
    """r of both positions of every state by enumeration, [16, 2, 4]: p(x0 at the position | xt elsewhere)."""
    found = np.zeros((N * N, 2, N))
    for i, (x, y) in enumerate(oracles.states(GRAPH, 2)):
        kernel = oracles.kernel(GRAPH, sigma)
        for position, joint in enumerate((P0 @ kernel[y], kernel[x] @ P0)):
            found[i, position] = joint / joint.sum()
    return found


@pytest.mark.parametrize("sigma", slow.all_but([0.5], [1e-3, 0.5, 5.0]))
def test_the_true_posterior_gives_the_true_score_and_the_least_score_entropy(sigma):
    exact, xs = oracles.exact_scores(GRAPH, P0, sigma), oracles.states(GRAPH, 2)
    joint = P0.ravel()[:, None] * np.kron(*(oracles.kernel(GRAPH, sigma),) * 2).T  # Of x0 and xt.
    x0, xt = jnp.asarray(np.repeat(xs, 16, 0)), jnp.asarray(np.tile(xs, (16, 1)))
    each, everywhere = jnp.full(256, sigma), jnp.ones((256, 1), bool)
    features = jnp.eye(16)[:, None]
    log_score_of = jax.jit(lambda model, xt: score_heads.log_score(model, features, xt, each[:16]))
    score_entropy = jax.jit(lambda summary: GRAPH.score_entropy(summary, each, xt, x0))

    @jax.jit
    def summary_of(model, xt, x0):
        return score_heads.summarize(model, jnp.tile(features, (16, 1, 1)), xt, x0, each, everywhere)

    def expected_loss(log_score):
        summary = scores.summarize(jnp.asarray(log_score, jnp.float32), xt, x0)
        return float((joint.ravel()[:, None] * np.float64(score_entropy(summary))).sum())

    def of_network(logits):
        """Score and loss of a network with these logits at each state, [16, 2, 4]."""
        log_score, summaries = np.zeros((16, 2, N)), []
        for position in range(2):
            model, at = head_of(logits[:, position])[0], slice(position, position + 1)
            log_score[:, position] = log_score_of(model, jnp.asarray(xs[:, at]))[:, 0]
            summaries.append(summary_of(model, *(jnp.asarray(np.asarray(x)[:, at]) for x in (xt, x0))))
        summary = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x, axis=1)), *summaries)
        streamed = (joint.ravel()[:, None] * np.float64(score_entropy(summary))).sum()
        return np.exp(log_score), float(streamed)

    least, logits = expected_loss(np.tile(np.log(exact), (16, 1, 1))), np.log(posteriors(sigma))
    score, loss = of_network(logits)
    np.testing.assert_allclose(score, exact, rtol=1e-4)
    assert loss == pytest.approx(least, abs=1e-5 * max(1, least))
    for seed in range(3):
        other = of_network(logits + 0.3 * np.random.default_rng(seed).normal(size=logits.shape))[1]
        assert other > least + min(1e-4, 5e-3 * least)


def udlm(r, xt, x0, t):
    """Continuous-time objective of a position (Schiff et al. 2024, equation 18), for the prediction r, [n, N]."""
    num_states = r.shape[1]
    sigma, rate = (np.float64(f(jnp.asarray(t, jnp.float32))) for f in (NOISE.sigma, NOISE.dsigma_dt))
    alpha = np.exp(-sigma)[:, None]
    derivative = -rate[:, None] * alpha
    bar = num_states * alpha * np.eye(num_states)[x0] + 1 - alpha
    bar_theta = num_states * alpha * r + 1 - alpha
    at = lambda x: np.take_along_axis(x, xt[:, None], 1)
    logs = np.log((at(bar_theta) * bar) / (bar_theta * at(bar)))
    terms = num_states / at(bar) - num_states / at(bar_theta) - (bar / at(bar) * logs).sum(1, keepdims=True)
    return (derivative / (num_states * alpha) * terms)[:, 0]


def test_the_bound_is_the_objective_of_udlm():
    generator, num_rows, num_states = np.random.default_rng(1), 60, 300
    logits = 2 * generator.normal(size=(num_rows, num_states))
    model, features = head_of(logits)
    xt, x0 = generator.integers(num_states, size=(2, num_rows))
    x0 = np.where(np.arange(num_rows) % 2, xt, x0)
    t = np.linspace(0.02, 0.98, num_rows)
    r = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    summary_fn = lambda xt, x0, sigma: score_heads.summarize(
        model, features, xt, x0, sigma, jnp.ones((num_rows, 1), bool)
    )
    process = forward.Process(graphs.Uniform(vocab_size=num_states), NOISE)
    texts = [jnp.asarray(x[:, None]) for x in (x0, xt)]
    found = jax.jit(lambda t: losses.bounds(summary_fn, process, *texts, t))(jnp.asarray(t))
    expected = udlm(np.float64(r), xt, x0, t)
    # Terms of the order of 1/sigma cancel where a token has moved in almost no noise.
    np.testing.assert_allclose(found.score_entropy, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).mean())


@pytest.mark.parametrize(
    ("graph", "scaled", "is_fine"),
    [("uniform", False, True), ("absorb", True, True), ("absorb", False, False), ("autoregressive", False, False)],
)
def test_a_config_normalises_either_graph(graph, scaled, is_fine):
    config = {"graph": {"name": graph}, "network": {"scale_by_sigma": scaled, "normalize": True}}
    if is_fine:
        assert configs.parse(configs.merge(config)).network.mixes_uniformly == (graph == "uniform")
        return
    with pytest.raises(errors.UserError, match=r"config\.network\.normalize=True"):
        configs.parse(configs.merge(config))
