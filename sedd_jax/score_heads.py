"""The score head: from features to the few numbers per position that losses and samplers need."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax import graphs, networks

# Positions are taken in blocks so that at most this many logits exist at once: 256 MiB in float32.
MAX_LOGITS = 1 << 26


def logits(params: networks.Params, features: Float[Array, "B L D"]) -> Float[Array, "B L P"]:
    """The head's raw output z over the padded vocabulary, accumulated in float32."""
    kernel = params["head_kernel"].astype(features.dtype)
    return jnp.dot(features, kernel, preferred_element_type=jnp.float32) + params["head_bias"][None, None]


def log_score(
    config: networks.NetworkConfig,
    params: networks.Params,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
) -> Float[Array, "B L V"]:
    """log of the score s(xt, sigma)_y for every state y, 0 at the current token."""
    z = logits(params, features)[..., : config.num_states]
    current = xt[..., None] == jnp.arange(config.num_states)[None, None]
    return jnp.where(current, 0.0, z + _log_scale(config, sigma)[..., None])


def summarize(
    config: networks.NetworkConfig,
    params: networks.Params,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
    sigma: Float[Array, "B"],
) -> graphs.ScoreSummary:
    """`graphs.summarize(log_score(...), xt, x0)` without the array over the vocabulary.

    The head runs over blocks of positions, and runs again in the backward pass, so memory holds one block at a time.
    """

    @jax.checkpoint
    def summarize_block(
        block: tuple[Float[Array, "B l D"], Int[Array, "B l"], Int[Array, "B l"]],
    ) -> graphs.ScoreSummary:
        features_block, xt_block, x0_block = block
        z = logits(params, features_block)
        states = jnp.arange(config.padded_states)[None, None]
        others = (states != xt_block[..., None]) & (states < config.num_states)
        scale = _log_scale(config, sigma)
        at_x0 = jnp.take_along_axis(z, x0_block[..., None], axis=-1)[..., 0]
        return graphs.ScoreSummary(
            logsumexp=jax.nn.logsumexp(jnp.where(others, z, -jnp.inf), axis=-1) + scale,
            mean=(jnp.where(others, z, 0.0).sum(-1) + (config.num_states - 1) * scale) / config.num_states,
            at_x0=jnp.where(xt_block == x0_block, 0.0, at_x0 + scale),
        )

    batch, length = xt.shape
    num_blocks = _num_blocks(length, batch * config.padded_states)
    if num_blocks == 1:
        return summarize_block((features, xt, x0))
    split = lambda x: jnp.moveaxis(x.reshape(batch, num_blocks, -1, *x.shape[2:]), 1, 0)
    blocks = jax.lax.map(summarize_block, (split(features), split(xt), split(x0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), blocks)


def _log_scale(config: networks.NetworkConfig, sigma: Float[Array, "B"]) -> Float[Array, "B 1"]:
    """What is added to z to make it log score: -log((e^sigma - 1) N) with N real tokens, or nothing."""
    if not config.scale_by_sigma:
        return jnp.zeros_like(sigma)[:, None]
    return -(jnp.log(jnp.expm1(sigma)) + jnp.log(jnp.float32(config.num_states - 1)))[:, None]


def _num_blocks(length: int, logits_per_position: int) -> int:
    wanted = -(-length * logits_per_position // MAX_LOGITS)
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)
