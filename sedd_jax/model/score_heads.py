"""The score head: from features to the few numbers per position that losses and samplers need.

The head's matrix product is computed in tiles of some positions by some states, and each tile is reduced at once. So
memory does not grow with length times vocabulary. Only the needed positions are computed: their features are gathered
as rows first, and the loop over rows ends with the last of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sedd_jax.diffusion import scores
from sedd_jax.model import layers, networks, tiles
from sedd_jax.runtime import sharding

# Logits in one tile. On a CPU they fit in its caches; elsewhere they keep matrix units busy (256 MiB in float32).
TILE_LOGITS = {"cpu": 1 << 18, "gpu": 1 << 26, "tpu": 1 << 26}
TILE_ROWS = {"cpu": 512, "gpu": 8192, "tpu": 8192}
NEVER = -1e30  # A logit that no state has. It is finite, so that differences are finite.


class _Positions(NamedTuple):
    """The inputs of a loss at each position."""

    features: Float[Array, "B L D"]
    xt: Int[Array, "B L"]
    x0: Int[Array, "B L"]
    is_needed: Bool[Array, "B L"]


def logits(model: networks.Model, features: Float[Array, "*B D"]) -> Float[Array, "*B P"]:
    """The head's output z over the P states of the padded vocabulary, accumulated in float32."""
    kernel, bias = _head(model)
    return tiles.head_product(features, kernel.astype(features.dtype), bias, layers.precision(model.config.dtype))


def log_score(
    model: networks.Model,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
) -> Float[Array, "B L V"]:
    """log of the score s(xt, sigma)_y for every state y, 0 at the current token.

    It holds the whole array over states, so it is for inspection and tests.
    """
    z = logits(model, features)[..., : model.config.num_states]
    current = xt[..., None] == jnp.arange(model.config.num_states)[None, None]
    logsumexp = jax.nn.logsumexp(jnp.where(current, -jnp.inf, z), axis=-1)
    return jnp.where(current, 0.0, z + log_scale(model.config, sigma, logsumexp)[..., None])


def summarize(
    model: networks.Model,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    is_needed: Bool[Array, "B L"],
) -> scores.ScoreSummary:
    """`scores.summarize(log_score(...), xt, x0)` where `is_needed`, 0 elsewhere, without the array over states.

    It is differentiable in parameters and features. The backward pass computes the logits of each tile again.
    """
    raw = _summarize(model.config, *_head(model), features, xt, x0, is_needed)
    summary = of_logits(model.config, raw, xt, x0, sigma)
    return jax.tree.map(lambda x: jnp.where(is_needed, x, 0.0), summary)


def of_logits(
    config: networks.NetworkConfig,
    raw: scores.ScoreSummary,
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
    sigma: Float[Array, "B"],
) -> scores.ScoreSummary:
    """The summary of the score from logsumexp and sum (as `mean`) of the logits z over y != xt, and z at x0."""
    scale = log_scale(config, sigma, raw.logsumexp)
    return scores.ScoreSummary(
        logsumexp=raw.logsumexp + scale,
        mean=(raw.mean + (config.num_states - 1) * scale) / config.num_states,
        at_x0=jnp.where(xt == x0, 0.0, raw.at_x0 + scale),
    )


def scale_needed(
    model: networks.Model,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    is_needed: Bool[Array, "B L"],
) -> Float[Array, "B L"]:
    """`log_scale` where `is_needed`, without the array over states. The head runs only if `config.normalize`."""
    if not model.config.normalize:
        return log_scale(model.config, sigma, jnp.zeros(xt.shape))
    raw = _summarize(model.config, *_head(model), features, xt, xt, is_needed)
    return log_scale(model.config, sigma, raw.logsumexp)


def log_scale(
    config: networks.NetworkConfig, sigma: Float[Array, "B"], logsumexp: Float[Array, "B L"]
) -> Float[Array, "B L"]:
    """The number to add to the head's output z to get log score.

    It is 0 without `scale_by_sigma`, and -log((e^sigma - 1) N) with it, for N real tokens. With `normalize` it is
    -log(e^sigma - 1) - logsumexp, so that scores sum to 1 / (e^sigma - 1).

    Args:
        config: says which of the three.
        sigma: total noise of each sequence.
        logsumexp: logsumexp of z over all y != xt.
    """
    if not config.scale_by_sigma:
        return jnp.zeros_like(logsumexp)
    log_num = logsumexp if config.normalize else jnp.full_like(logsumexp, jnp.log(jnp.float32(config.num_states - 1)))
    return -jnp.log(jnp.expm1(sigma))[:, None] - log_num


def _head(model: networks.Model) -> tuple[Float[Array, "D P"], Float[Array, " P"]]:
    return model.params["head_kernel"], model.params["head_bias"]


def _make_tiles(
    config: networks.NetworkConfig, tensor: tuple[str, ...], kernel: Array, bias: Array, is_needed: Bool[Array, "B L"]
) -> tuple[tiles.Rows, tiles.Vocabulary]:
    """The needed positions of one device as rows, and its part of the vocabulary as blocks."""
    size = tiles.chunk_size(is_needed.size, TILE_ROWS[sharding.platform()])
    width = min(len(bias), max(128, TILE_LOGITS[sharding.platform()] // size))
    first = jax.lax.axis_index(tensor) * len(bias) if tensor else 0
    vocabulary = tiles.Vocabulary(kernel, bias, first, config.num_states, width, layers.precision(config.dtype))
    return tiles.choose(is_needed, size), vocabulary


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summarize(
    config: networks.NetworkConfig, kernel: Array, bias: Array, features: Array, xt: Array, x0: Array, is_needed: Array
) -> scores.ScoreSummary:
    """logsumexp and sum (as `mean`) of the logits z over y != xt, and z at x0; 0 where not needed."""
    batch, tensor = sharding.mapped_axes(len(xt))
    run = functools.partial(_summarize_part, config, tensor)
    tokens = PartitionSpec(batch)
    in_specs = (PartitionSpec(None, tensor), PartitionSpec(tensor), tokens)
    positions = _Positions(features, xt, x0, is_needed)
    return sharding.per_device(run, in_specs, tokens)(kernel.astype(features.dtype), bias, positions)


def _summarize_forward(config: networks.NetworkConfig, *inputs: Array) -> tuple[scores.ScoreSummary, Any]:
    raw = _summarize(config, *inputs)
    return raw, (inputs, raw.logsumexp)


def _summarize_backward(
    config: networks.NetworkConfig, residuals: Any, gradient: scores.ScoreSummary
) -> tuple[Any, ...]:
    (kernel, bias, *inputs), logsumexp = residuals
    positions = _Positions(*inputs)
    batch, tensor = sharding.mapped_axes(len(positions.xt))
    run = functools.partial(_gradient_part, config, (batch, tensor))
    tokens = PartitionSpec(batch)
    in_specs = (PartitionSpec(None, tensor), PartitionSpec(tensor), *(tokens,) * 3)
    out_specs = (kernel_spec(batch, tensor), PartitionSpec(tensor), tokens)
    of_kernel, of_bias, of_features = sharding.per_device(run, in_specs, out_specs)(
        kernel.astype(positions.features.dtype), bias, positions, logsumexp, gradient
    )
    return of_kernel, of_bias, of_features, None, None, None


_summarize.defvjp(_summarize_forward, _summarize_backward)


def _summarize_part(
    config: networks.NetworkConfig, tensor: tuple[str, ...], kernel: Array, bias: Array, positions: _Positions
) -> scores.ScoreSummary:
    """`_summarize` for one device's sequences; parts of the vocabulary are combined over the `tensor` axes."""
    rows, vocabulary = _make_tiles(config, tensor, kernel, bias, positions.is_needed)
    features, xt, x0 = (rows.gather(x) for x in positions[:3])

    def visit_block(k: Int[Array, ""], sums: Any) -> Any:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], sums: Any) -> Any:
            top, mass, total, at_x0 = (rows.chunk(x, i) for x in sums)
            z = states.logits(rows.chunk(features, i))
            others = states.other_than(rows.chunk(xt, i))
            new_top = jnp.maximum(top, jnp.where(others, z, NEVER).max(-1))
            mass = mass * jnp.exp(top - new_top) + jnp.where(others, jnp.exp(z - new_top[:, None]), 0.0).sum(-1)
            total += jnp.where(others, z, 0.0).sum(-1)
            at_x0 += jnp.where(states.equal_to(rows.chunk(x0, i)), z, 0.0).sum(-1)
            return jax.tree.map(lambda x, new: tiles.put(x, new, i), sums, (new_top, mass, total, at_x0))

        return rows.visit(visit, sums)

    zeros = jnp.zeros(len(rows.order))
    start = (zeros + NEVER, zeros, zeros, zeros)
    top, mass, total, at_x0 = jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, start)
    largest = jax.lax.pmax(top, tensor)
    mass, total, at_x0 = jax.lax.psum((mass * jnp.exp(top - largest), total, at_x0), tensor)
    logsumexp = jnp.where(mass > 0, largest + jnp.log(jnp.where(mass > 0, mass, 1.0)), 0.0)
    return scores.ScoreSummary(*(rows.scatter(x, positions.xt.shape) for x in (logsumexp, total, at_x0)))


def _gradient_part(
    config: networks.NetworkConfig,
    axes: tuple[tuple[str, ...], tuple[str, ...]],
    kernel: Array,
    bias: Array,
    positions: _Positions,
    logsumexp: Float[Array, "B L"],
    gradient: scores.ScoreSummary,
) -> tuple[Array, Array, Array]:
    """Gradients of kernel, bias and features, given those of one device's summary. It computes the logits again."""
    batch, tensor = axes
    rows, vocabulary = _make_tiles(config, tensor, kernel, bias, positions.is_needed)
    f, xt, x0, logsumexp = (rows.gather(x) for x in (*positions[:3], logsumexp))
    by_logsumexp, by_total, by_x0 = (rows.gather(x) for x in gradient)
    product = functools.partial(jnp.dot, precision=vocabulary.precision, preferred_element_type=jnp.float32)

    def visit_block(k: Int[Array, ""], sums: Any) -> Any:
        of_kernel, of_bias, of_f = sums
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], sums: Any) -> Any:
            of_block, of_block_bias, of_f = sums
            column = lambda x: rows.chunk(x, i)[:, None]
            f_chunk = rows.chunk(f, i)
            share = jnp.exp(states.logits(f_chunk) - column(logsumexp))
            others, at_x0 = states.other_than(rows.chunk(xt, i)), states.equal_to(rows.chunk(x0, i))
            of_z = jnp.where(others, column(by_logsumexp) * share + column(by_total), 0.0)
            of_z += jnp.where(at_x0, column(by_x0), 0.0)
            narrow = of_z.astype(f.dtype)
            of_f = tiles.put(of_f, rows.chunk(of_f, i) + product(narrow, states.kernel.T), i)
            return of_block + product(f_chunk.T, narrow), of_block_bias + of_z.sum(0), of_f

        start = (jnp.zeros(states.kernel.shape), jnp.zeros(states.bias.shape), of_f)
        of_block, of_block_bias, of_f = rows.visit(visit, start)
        # Blocks are added, not written: the last one overlaps the block before it, with zeros in the overlap.
        before = jax.lax.dynamic_slice_in_dim(of_kernel, states.start, vocabulary.width, axis=1)
        of_kernel = jax.lax.dynamic_update_slice_in_dim(of_kernel, before + of_block, states.start, axis=1)
        before = jax.lax.dynamic_slice_in_dim(of_bias, states.start, vocabulary.width)
        return of_kernel, tiles.put(of_bias, before + of_block_bias, states.start), of_f

    start = (jnp.zeros(kernel.shape), jnp.zeros(bias.shape), jnp.zeros(f.shape))
    of_kernel, of_bias, of_f = jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, start)
    of_features = rows.scatter(jax.lax.psum(of_f, tensor).astype(f.dtype), positions.xt.shape)
    return add_kernels(of_kernel, batch), jax.lax.psum(of_bias, batch), of_features


def kernel_spec(batch: tuple[str, ...], tensor: tuple[str, ...]) -> PartitionSpec:
    """How the gradient of the head's kernel is split over devices."""
    return PartitionSpec("fsdp" if "fsdp" in batch else None, tensor)


def add_kernels(of_kernel: Float[Array, "D P"], batch: tuple[str, ...]) -> Float[Array, "d P"]:
    """The sum of all devices' gradients of the head's kernel; under fsdp each device gets its rows."""
    if "fsdp" in batch:
        of_kernel = jax.lax.psum_scatter(of_kernel, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(of_kernel, tuple(axis for axis in batch if axis != "fsdp"))
