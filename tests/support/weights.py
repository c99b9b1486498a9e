"""Weights for networks whose own first ones are not what a test is about."""

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.model import networks


def drawn(config: networks.NetworkConfig, seed: int = 0) -> networks.Params:
    """Weights of which none is 0. NumPy draws them: `networks.init` would have to be compiled for every size."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        is_scale = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(1 + 0.1 * noise if is_scale else 0.15 * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: networks.init(jax.random.key(0), config)))
