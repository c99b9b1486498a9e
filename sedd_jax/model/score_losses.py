"""The training loss from features, with its gradient, in one pass over the head's logits.

`score_heads.summarize` needs the logits twice: for the summary, and again for the gradient once the loss has one. Here
a tile holds all states of some positions. So the loss of these positions and its gradient in the logits are known as
soon as the tile is, and three matrix products do the work of four.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sedd_jax.diffusion import losses, scores
from sedd_jax.model import layers, networks, score_heads, tiles
from sedd_jax.runtime import sharding

# (summary, sigma, xt, x0) -> both bounds of every position.
BoundsFn = Callable[[scores.ScoreSummary, Float[Array, "B"], Int[Array, "B L"], Int[Array, "B L"]], losses.Bounds]
# Logits in a tile: on a CPU they fit in its caches, elsewhere they take 1 GiB in float32.
TILE_LOGITS = {"cpu": 1 << 18, "gpu": 1 << 28, "tpu": 1 << 28}
LEAST_ROWS = 128


class Total(NamedTuple):
    """Both bounds of a batch, in nats. Only `score_entropy` is differentiable, in parameters and features.

    Attributes:
        score_entropy: the training loss: the sum over sequences, with their weights.
        cross_entropy: the tighter bound, likewise.
        of_sequences: what each sequence adds to `score_entropy`.
    """

    score_entropy: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    of_sequences: Float[Array, "B"]


class _Positions(NamedTuple):
    """The inputs of the loss at each position but features. `weights` are the positions' factors in the total."""

    xt: Int[Array, "B L"]
    x0: Int[Array, "B L"]
    sigma: Float[Array, "B L"]
    weights: Float[Array, "B L"]
    is_needed: Bool[Array, "B L"]


@jax.named_scope("head")
def total(
    model: networks.Model,
    features: Float[Array, "B L D"],
    inputs: losses.Noised,
    is_needed: Bool[Array, "B L"],
    bounds_fn: BoundsFn,
) -> Total:
    """Both bounds, summed over the positions where `is_needed`, with the weight of each sequence.

    Args:
        model: the network.
        features: its features of the noised tokens.
        inputs: clean and noised tokens, noise levels and weights of the sequences.
        is_needed: positions that count.
        bounds_fn: bounds of positions, from the summary of their scores.
    """
    xt, x0 = inputs.xt, inputs.x0
    if not fits(model.config, xt.size // sharding.num_batch_devices()):
        summary = score_heads.summarize(model, features, xt, x0, inputs.sigma, is_needed)
        found = _weigh(bounds_fn(summary, inputs.sigma, xt, x0), inputs.weights)
        return Total(
            found.score_entropy.sum(), *jax.lax.stop_gradient((found.cross_entropy.sum(), found.score_entropy))
        )
    spread = lambda x: jnp.broadcast_to(x[:, None], xt.shape)
    positions = _Positions(xt, x0, spread(inputs.sigma), spread(inputs.weights), is_needed)
    kernel, bias = model.params["head_kernel"], model.params["head_bias"]
    return _total(model.config, bounds_fn, kernel, bias, features, positions)


def _weigh(bounds: losses.Bounds, weights: Float[Array, "B"]) -> losses.Bounds:
    """Both bounds of each sequence [B], from those of its positions [B, L]."""
    return losses.Bounds(*(weights * x.sum(-1) for x in bounds))


def _num_rows(config: networks.NetworkConfig, num_positions: int) -> int:
    """Number of rows in a tile.

    Half of the positions of the absorbing graph are masks, give or take 2 %. A tile has an eighth of that, so that the
    last tile wastes little.
    """
    eighth = -(-num_positions * 33 // 512 // 64) * 64
    most = min(score_heads.TILE_ROWS[sharding.platform()], TILE_LOGITS[sharding.platform()] // config.padded_states)
    return min(num_positions, max(LEAST_ROWS, min(eighth, most)))


def fits(config: networks.NetworkConfig, num_positions: int) -> bool:
    """Whether all states of a tile's rows are on one device, and small enough."""
    rows = _num_rows(config, num_positions)
    is_split = sharding.axis_size(sharding.mapped_axes(1)[1]) > 1
    return not is_split and rows * config.padded_states <= TILE_LOGITS[sharding.platform()]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    config: networks.NetworkConfig,
    bounds_fn: BoundsFn,
    kernel: Array,
    bias: Array,
    features: Array,
    positions: _Positions,
) -> Total:
    return _total_forward(config, bounds_fn, kernel, bias, features, positions)[0]


def _total_forward(
    config: networks.NetworkConfig,
    bounds_fn: BoundsFn,
    kernel: Array,
    bias: Array,
    features: Array,
    positions: _Positions,
) -> tuple[Total, Any]:
    """The total, and the gradients of kernel, bias and features."""
    batch, tensor = sharding.mapped_axes(len(positions.xt))
    run = functools.partial(_part, config, bounds_fn, batch)
    tokens, whole = PartitionSpec(batch), PartitionSpec()
    out_specs = ((whole, whole, tokens), (tiles.kernel_spec(batch, tensor), whole, tokens))
    found, gradients = sharding.per_device(run, (whole, whole, tokens, tokens), out_specs)(
        kernel.astype(features.dtype), bias, features, positions
    )
    return Total(*found), gradients


def _total_backward(
    config: networks.NetworkConfig, bounds_fn: BoundsFn, gradients: Any, of_total: Total
) -> tuple[Any, ...]:
    return *(x * of_total.score_entropy.astype(x.dtype) for x in gradients), None


_total.defvjp(_total_forward, _total_backward)


def _part(
    config: networks.NetworkConfig,
    bounds_fn: BoundsFn,
    batch: tuple[str, ...],
    kernel: Array,
    bias: Array,
    features: Array,
    positions: _Positions,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Total and gradients for one device's sequences, then summed over devices."""
    shape = positions.xt.shape
    rows = tiles.choose(positions.is_needed, _num_rows(config, positions.xt.size))
    f, xt, x0, sigma, weights = (rows.gather(x) for x in (features, *positions[:-1]))
    # Rows after the last position have weight 0; any noise level keeps them finite.
    sigma = jnp.where(jnp.arange(len(sigma)) < rows.count, sigma, 1.0)
    precision = layers.precision(config.dtype)
    states = tiles.Vocabulary(kernel, bias, 0, config.num_states, len(bias), precision).block(jnp.zeros((), jnp.int32))
    product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def visit(i: Int[Array, ""], sums: Any) -> Any:
        cross_entropy, of_rows, of_kernel, of_bias, of_f = sums
        f_chunk, xt_chunk, x0_chunk, sigma_chunk, weight = (rows.chunk(x, i) for x in (f, xt, x0, sigma, weights))
        z = states.logits(f_chunk)
        raw, slope, log_noise = score_heads.of_whole_rows(config, states, z, (xt_chunk, x0_chunk), sigma_chunk)

        def weighted(raw: score_heads.Raw) -> losses.Bounds:
            # Each row as a sequence of one position.
            of_chunk = xt_chunk[:, None], x0_chunk[:, None]
            raw = jax.tree.map(lambda x: x[:, None], raw)
            summary = score_heads.of_logits(config, raw, *of_chunk, sigma_chunk)
            return _weigh(bounds_fn(summary, sigma_chunk, *of_chunk), weight)

        of_tile, pull = jax.vjp(weighted, raw)
        (by,) = pull(losses.Bounds(score_entropy=jnp.ones_like(weight), cross_entropy=jnp.zeros_like(weight)))
        by = score_heads.through_softmax(config, raw, slope, by)
        of_z = score_heads.logit_gradient(config, states, z, (xt_chunk, x0_chunk), raw, log_noise, by)
        narrow = of_z.astype(f.dtype)
        return (
            cross_entropy + of_tile.cross_entropy.sum(),
            tiles.put(of_rows, of_tile.score_entropy, i),
            of_kernel + product(f_chunk.T, narrow),
            of_bias + of_z.sum(0),
            tiles.put(of_f, product(narrow, kernel.T).astype(f.dtype), i),
        )

    start = (jnp.zeros(()), jnp.zeros(len(f)), jnp.zeros(kernel.shape), jnp.zeros(bias.shape), jnp.zeros_like(f))
    cross_entropy, of_rows, of_kernel, of_bias, of_f = rows.visit(visit, start)
    gradients = tiles.add_kernels(of_kernel, batch), jax.lax.psum(of_bias, batch), rows.scatter(of_f, shape)
    total = jax.lax.psum(of_rows.sum(), batch), jax.lax.psum(cross_entropy, batch), rows.scatter(of_rows, shape).sum(-1)
    return total, gradients
