"""The autoregressive baseline: the same network, causal, predicts each token from those before it.

Its input is the sequence moved by one position, with the mask of the absorbing graph in front; sigma is 0 throughout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs, samplers
from sedd_jax.model import networks, score_heads

# (key, the network's input, masks, sigma, positions to draw, law of a step from the mask) -> tokens there.
DrawFn = Callable[
    [Key[Array, ""], Int[Array, "B L"], Int[Array, "B L"], Float[Array, "B"], Bool[Array, "B L"], samplers.JumpFn],
    Int[Array, "B L"],
]


def log_likelihood(
    config: networks.NetworkConfig,
    params: networks.Params,
    x0: Int[Array, "B L"],
    graph: graphs.Absorbing,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B L"]:
    """log p(x0_l | x0_1, ..., x0_{l-1}) of every token, in nats."""
    inputs, sigma = _inputs(x0, graph)
    features = networks.apply(config, params, inputs, sigma, dropout_key)
    masks = jnp.full_like(x0, graph.mask_id)
    summary = score_heads.summarize(config, params, features, masks, x0, sigma, jnp.ones_like(x0, bool))
    return summary.at_x0 - summary.logsumexp


def features(
    config: networks.NetworkConfig, params: networks.Params, x0: Int[Array, "B L"], graph: graphs.Absorbing
) -> Float[Array, "B L D"]:
    """What the head reads once each token has been read; at the last position, once the one before it has."""
    inputs, sigma = _inputs(x0, graph)
    found = networks.apply(config, params, inputs, sigma)
    return jnp.concatenate([found[:, 1:], found[:, -1:]], axis=1)


def draw(
    key: Key[Array, ""],
    draw_fn: DrawFn,
    graph: graphs.Absorbing,
    given: samplers.Given,
    x: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
) -> Int[Array, "B L"]:
    """Draws the tokens at positions `start` to `stop`, one evaluation of the network each, given those before.

    Args:
        key: base key of the whole sequence; that of a position is folded from its number.
        draw_fn: draws tokens in place of masks from the network's output.
        graph: whose mask is in front and wherever no token is drawn yet.
        given: known tokens, which are kept.
        x: the sequence so far.
        start: first position to draw.
        stop: position to stop before.
    """

    def step(position: Int[Array, ""], x: Int[Array, "B L"]) -> Int[Array, "B L"]:
        inputs, sigma = _inputs(x, graph)
        is_next = (jnp.arange(x.shape[1]) == position)[None] & ~given.is_given
        masks = jnp.full_like(x, graph.mask_id)
        law = lambda total: graph.denoise_jump(total, masks, sigma)
        key_position = jax.random.fold_in(key, position)
        return jnp.where(is_next, draw_fn(key_position, inputs, masks, sigma, is_next, law), x)

    return jax.lax.fori_loop(start, stop, step, given.clamp(x))


def refuse_text_after_gaps(is_given: Bool[np.ndarray, "*B L"]) -> None:
    """Raises ValueError where text is given that the baseline does not see when it fills a gap before."""
    if (np.diff(is_given.astype(np.int8), axis=-1) > 0).any():
        raise ValueError(
            "an autoregressive run sees no text after a gap: give text at the start only, as --prefix does"
        )


def _inputs(x: Int[Array, "B L"], graph: graphs.Absorbing) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    first = jnp.full((len(x), 1), graph.mask_id, x.dtype)
    return jnp.concatenate([first, x[:, :-1]], axis=1), jnp.zeros(len(x))
