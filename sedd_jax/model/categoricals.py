"""Draws from a categorical distribution precisely, in float32.

Gumbel noise made from one float32 uniform is at most about 16.6. So outcomes with odds below e^-16.6 are drawn too
rarely. Summed over a large vocabulary and many steps, this silently anneals a diffusion sampler (Zheng et al. 2024,
arXiv 2409.02908). Here the noise has 46 random bits near zero and reaches about 32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def draw(key: Key[Array, ""], weights: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """Draws y with probability proportional to max(weights[y], 0); exact for odds far below float32's resolution."""
    return jnp.argmax(_log_weights(weights) + jax.random.gumbel(key, weights.shape, mode="high"), axis=-1)


def relative(log_weights: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Log weights minus the highest of them. If all are minus infinity, they stay so."""
    highest = log_weights.max(-1, keepdims=True)
    return log_weights - jnp.where(jnp.isfinite(highest), highest, 0.0)


def race_published(key: Key[Array, ""], weights: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Values whose argmax is the draw of the published PyTorch program; for comparison only.

    Each is a weight divided by an exponential, which is made from one float32 uniform and shifted by 1e-10 twice.
    """
    uniform = jax.random.uniform(key, weights.shape)
    return weights / (1e-10 - jnp.log(uniform + 1e-10))


def _log_weights(weights: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    positive = weights > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, weights, 1.0)), -jnp.inf)
