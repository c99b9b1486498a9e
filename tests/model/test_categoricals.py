"""Draws follow their weights, also where odds are far below float32's resolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.model import categoricals
from tests.support import oracles

# One outcome of weight 1 and 50,000 of 2e-8 each: 1 draw in 1,000 is rare. Float32 Gumbel noise stops at 16.6, so an
# outcome of odds below 6e-8 wins only where the common one's own noise is low: a small part of that.
NUM_RARE, ODDS, NUM_DRAWS = 50_000, 2e-8, 6_000


def count_rare(draw) -> int:
    weights = jnp.full((20, NUM_RARE + 1), ODDS).at[:, 0].set(1.0)
    count = lambda key: (draw(key, weights) != 0).sum()
    return int(
        jax.jit(lambda keys: jax.lax.map(count, keys).sum())(jax.random.split(jax.random.key(0), NUM_DRAWS // 20))
    )


@pytest.mark.slow
def test_draw_is_right_at_tiny_odds():
    expected = NUM_DRAWS * NUM_RARE * ODDS
    assert expected / 3 < count_rare(categoricals.draw) < 2 * expected


@pytest.mark.slow
def test_float32_noise_is_wrong_at_tiny_odds():
    """What the test above would see if `draw` used the default noise; so it can fail."""
    rare = count_rare(lambda key, weights: jax.random.categorical(key, jnp.log(weights)))
    assert rare < NUM_DRAWS * NUM_RARE * ODDS / 3


DRAWS = {
    "precise": categoricals.draw,
    "published": lambda key, weights: categoricals.race_published(key, weights).argmax(-1),
}


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_draws_follow_their_weights(name):
    """Weights need not sum to 1; negative ones count as 0, and what has weight 0 is never drawn."""
    weights = jnp.array([0.5, 0.0, 2.0, -1.0, 0.01, 1e-3])
    tokens = DRAWS[name](jax.random.key(1), jnp.tile(weights[None], (50_000, 1)))
    probabilities = np.maximum(np.asarray(weights, float), 0)
    counts = np.bincount(tokens, minlength=len(weights))
    assert oracles.chi_square_p(counts, probabilities / probabilities.sum()) > 1e-4


def test_positions_are_drawn_independently():
    weights = jnp.full((40_000, 2, 3), 1 / 3)
    tokens = np.asarray(categoricals.draw(jax.random.key(2), weights))
    assert oracles.chi_square_p(np.bincount(3 * tokens[:, 0] + tokens[:, 1], minlength=9), np.full(9, 1 / 9)) > 1e-4


def test_tiny_weights_do_not_underflow():
    weights = jnp.tile(jnp.array([[1e-30, 3e-30, 0.0]]), (20_000, 1))
    counts = np.bincount(categoricals.draw(jax.random.key(4), weights), minlength=3)
    assert oracles.chi_square_p(counts, np.array([0.25, 0.75, 0.0])) > 1e-4
