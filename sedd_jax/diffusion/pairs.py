"""Pairs of copies of a sequence with opposite noise: positions that one copy keeps, the other loses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def uniform(key: Key[Array, ""], shape: tuple[int, ...], paired: bool) -> Float[Array, "B *L"]:
    """Uniform numbers. If `paired`, entry 2i + 1 is 1 minus entry 2i, so each by itself is uniform (antithetic)."""
    if not paired:
        return jax.random.uniform(key, shape)
    u = jax.random.uniform(key, (shape[0] // 2, *shape[1:]))
    return opposite(u)


def opposite(u: Float[Array, "H *L"]) -> Float[Array, "B *L"]:
    """Each of H = B / 2 entries, followed by 1 minus itself."""
    return jnp.stack([u, 1 - u], axis=1).reshape(2 * len(u), *u.shape[1:])
