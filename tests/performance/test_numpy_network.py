"""The network in NumPy equals the one in JAX, which was compared with recorded arrays of the published program."""

import jax
import numpy as np
import pytest

from sedd_jax.diffusion import absorbing
from sedd_jax.model import networks, objectives, score_heads
from sedd_jax.performance import numpy_network, self_test


@pytest.fixture(scope="module")
def tiny():
    """The network of the self-test in JAX, its parameters in float64, and its sequences."""
    params, _, inputs = self_test.make_tiny()
    wide = jax.tree.map(np.float64, params)
    return networks.Model(self_test.TINY, jax.device_put(params)), wide, inputs


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_features_and_log_scores_are_those_of_jax(tiny):
    model, params, inputs = tiny
    xt, sigma = np.asarray(inputs.xt), np.float64(inputs.sigma)
    features = networks.apply(model, inputs.xt, inputs.sigma)
    assert_close(numpy_network.features(model.config, params, xt, sigma), features)
    expected = score_heads.log_score(model, features, inputs.xt, inputs.sigma)
    ours = numpy_network.log_score(model.config, params, xt, sigma)
    is_other = xt[..., None] != np.arange(model.config.num_states)  # Ours has no meaning at the current token.
    assert_close(ours * is_other, expected)


def test_loss_is_that_of_jax(tiny):
    model, params, inputs = tiny
    graph = absorbing.Absorbing(vocab_size=self_test.NUM_TOKENS, mask_id=self_test.NUM_TOKENS)
    expected = objectives.noised_bounds(model, graph, inputs).score_entropy
    assert numpy_network.loss(model.config, params, inputs) == pytest.approx(float(expected), rel=1e-5)
