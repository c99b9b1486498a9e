"""Correctors: undo part of a trajectory, so that it is drawn again given all tokens that are known by then."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward


def add_noise(
    key: Key[Array, ""],
    process: forward.Process,
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> Int[Array, "B L"]:
    """The states after the forward process from time t - dt back to t (Campbell et al. 2022, section 4.4).

    Args:
        key: random key.
        process: the forward process.
        xt: states at t - dt.
        t: time of each sequence before its reverse step.
        dt: length of the reverse step.
    """
    return process.graph.sample_transition(key, xt, process.noise.sigma(t) - process.noise.sigma(t - dt))


def mask_again(
    key: Key[Array, ""], mask_id: int, xt: Int[Array, "B L"], is_filled: Bool[Array, "B L"], count: Int[Array, "B"]
) -> Int[Array, "B L"]:
    """xt with `count` of the filled positions of each sequence masked again, chosen uniformly."""
    chance = jnp.where(is_filled, jax.random.uniform(key, xt.shape), 2.0)
    place = jnp.argsort(jnp.argsort(chance, axis=1), axis=1)
    return jnp.where(is_filled & (place < count[:, None]), mask_id, xt)
