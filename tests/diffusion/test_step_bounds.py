"""`step_bound` of every graph: against the KL divergence written out, with any score."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import graphs, scores
from tests.support import oracles

N = 4
GRAPHS = {
    "absorb": graphs.Absorbing(vocab_size=N, mask_id=N),
    "mask inside": graphs.Absorbing(vocab_size=N, mask_id=1),
    "uniform": graphs.Uniform(vocab_size=N),
}


def distribution(graph, score, xt, sigma, after):
    """The step's distribution over all states, from one position's score."""
    others = np.arange(graph.num_states) != xt
    p = np.zeros(graph.num_states)
    if graph.has_mask:
        if xt != graph.mask_id:
            p[xt] = 1
            return p
        leaves = (np.exp(-after) - np.exp(-sigma)) / (1 - np.exp(-sigma))
        p[others] = leaves * score[others] / score[others].sum()
        p[xt] = 1 - leaves
        return p
    rates = (sigma - after) * oracles.rate_matrix(graph)[xt] * score
    total = rates[others].sum()
    p[others] = -np.expm1(-total) * rates[others] / total
    p[xt] = np.exp(-total)
    return p


def divergence(graph, score, xt, x0, sigma, after):
    """KL of q(xs | xt, x0) from that distribution, by Bayes' rule over all xs."""
    q = oracles.kernel(graph, sigma - after)[xt] * oracles.kernel(graph, after)[:, x0]
    q = q / q.sum()
    p = distribution(graph, score, xt, sigma, after)
    positive = q > 1e-14
    return float((q[positive] * (np.log(q[positive]) - np.log(p[positive]))).sum())


@pytest.mark.parametrize(("sigma", "after"), [(3.0, 1.2), (0.9, 0.8), (1e-3, 1e-4)])
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_a_step_costs_its_divergence(kind, sigma, after):
    graph = GRAPHS[kind]
    log_score = np.random.default_rng(0).normal(size=graph.num_states)
    pairs = [
        (xt, x0)
        for xt in range(graph.num_states)
        for x0 in range(graph.num_states)
        if not graph.has_mask or (x0 != graph.mask_id and xt in (graph.mask_id, x0))
    ]
    xt, x0 = (jnp.asarray(column, jnp.int32)[None] for column in zip(*pairs, strict=True))
    table = np.where(np.asarray(xt)[..., None] == np.arange(graph.num_states), 0.0, log_score)
    summary = scores.summarize(jnp.asarray(table, jnp.float32), xt, x0)
    noise = [jnp.array([value], jnp.float32) for value in (sigma, after)]
    bound = jax.jit(graph.step_bound)(summary, *noise, xt, x0)
    expected = [divergence(graph, np.exp(log_score), a, b, sigma, after) for a, b in pairs]
    np.testing.assert_allclose(bound[0], expected, rtol=2e-3, atol=2e-6)
    assert max(expected) > 1e-3


@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_all_steps_together_bound_the_entropy_and_finer_ones_more_tightly(kind):
    """With the exact score of one token, to which absorbing steps of any length are exact."""
    graph, p0 = GRAPHS[kind], np.array([0.6, 0.25, 0.1, 0.05])
    entropy = -(p0 * np.log(p0)).sum()

    def bound(sigmas):
        total = 0.0
        for sigma, after in itertools.pairwise(sigmas):
            table = oracles.exact_scores(graph, p0, sigma)[:, 0]
            joint = oracles.kernel(graph, sigma)[:, :N] * p0
            for xt, x0 in zip(*np.nonzero(joint > 1e-12), strict=True):
                row = np.where(table[xt] > 0, table[xt], 1e-30)
                total += joint[xt, x0] * divergence(graph, row, xt, x0, sigma, after)
        return total

    coarse, fine = (bound(np.geomspace(12.0, 1e-5, n + 1)) for n in (6, 150))
    if kind == "absorb":
        assert coarse == pytest.approx(entropy, rel=1e-3)
    else:
        assert coarse > entropy * 1.5
    assert fine == pytest.approx(entropy, rel=1e-3 if kind == "absorb" else 0.1)
    assert fine > entropy * 0.999
