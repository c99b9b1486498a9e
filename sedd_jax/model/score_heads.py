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
    log_noise: Float[Array, "B L"] | None = None


class Raw(NamedTuple):
    """What a loss or a sampler needs of the logits z of each position.

    Attributes:
        logsumexp: logsumexp of z over all y != xt.
        total: sum over all y != xt of z; with `config.mixes_uniformly`, of log(1 + N r_y / (e^sigma - 1)), where r is
            the softmax of z.
        at_x0: z at x0.
        at_xt: z at xt with `config.mixes_uniformly`, else 0.
    """

    logsumexp: Float[Array, "*B"]
    total: Float[Array, "*B"]
    at_x0: Float[Array, "*B"]
    at_xt: Float[Array, "*B"]


class Scale(NamedTuple):
    """How the score follows from the head's output z: score_y = exp(z_y + log_scale) + shift; a shift of None is 0."""

    log_scale: Float[Array, "B L"]
    shift: Float[Array, "B L"] | None = None


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
    if model.config.mixes_uniformly:
        at_xt = jnp.take_along_axis(z, xt[..., None], axis=-1)[..., 0]
        log_odds = log_noise(model.config, sigma, xt) - jnp.logaddexp(logsumexp, at_xt)
        mixed = jax.nn.softplus(z + log_odds[..., None])
        return jnp.where(current, 0.0, mixed - jax.nn.softplus(at_xt + log_odds)[..., None])
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
    noise = log_noise(model.config, sigma, xt) if model.config.mixes_uniformly else None
    raw = _summarize(model.config, *_head(model), _Positions(features, xt, x0, is_needed, noise))
    summary = of_logits(model.config, raw, xt, x0, sigma)
    return jax.tree.map(lambda x: jnp.where(is_needed, x, 0.0), summary)


def of_logits(
    config: networks.NetworkConfig,
    raw: Raw,
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
    sigma: Float[Array, "B"],
) -> scores.ScoreSummary:
    """The summary of the score from that of the logits."""
    num_others = config.num_states - 1
    if config.mixes_uniformly:
        log_odds = log_noise(config, sigma, xt) - jnp.logaddexp(raw.logsumexp, raw.at_xt)
        at_xt = jax.nn.softplus(raw.at_xt + log_odds)
        return scores.ScoreSummary(
            logsumexp=jnp.logaddexp(jnp.log(jnp.float32(num_others)), raw.logsumexp + log_odds) - at_xt,
            mean=(raw.total - num_others * at_xt) / config.num_states,
            at_x0=jnp.where(xt == x0, 0.0, jax.nn.softplus(raw.at_x0 + log_odds) - at_xt),
        )
    scale = log_scale(config, sigma, raw.logsumexp)
    return scores.ScoreSummary(
        logsumexp=raw.logsumexp + scale,
        mean=(raw.total + num_others * scale) / config.num_states,
        at_x0=jnp.where(xt == x0, 0.0, raw.at_x0 + scale),
    )


def scale_needed(
    model: networks.Model,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    is_needed: Bool[Array, "B L"],
) -> Scale:
    """How the score follows from the head's output where `is_needed`. The head runs only if `config.normalize`."""
    config = model.config
    if not config.normalize:
        return Scale(log_scale(config, sigma, jnp.zeros(xt.shape)))
    raw = _summarize(config, *_head(model), _Positions(features, xt, xt, is_needed))
    if not config.mixes_uniformly:
        return Scale(log_scale(config, sigma, raw.logsumexp))
    log_odds = log_noise(config, sigma, xt) - jnp.logaddexp(raw.logsumexp, raw.at_xt)
    at_xt = jax.nn.softplus(raw.at_xt + log_odds)
    return Scale(log_odds - at_xt, jnp.exp(-at_xt))


def log_noise(config: networks.NetworkConfig, sigma: Float[Array, "B"], xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log(N / (e^sigma - 1)), the log odds of no noise against noise, times the number N of tokens."""
    log_noise = jnp.log(jnp.float32(config.num_states)) - jnp.log(jnp.expm1(sigma))
    return jnp.broadcast_to(log_noise[:, None], xt.shape)


def log_scale(
    config: networks.NetworkConfig, sigma: Float[Array, "B"], logsumexp: Float[Array, "B L"]
) -> Float[Array, "B L"]:
    """The number to add to the head's output z to get log score, unless `config.mixes_uniformly`.

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
def _summarize(config: networks.NetworkConfig, kernel: Array, bias: Array, positions: _Positions) -> Raw:
    """`Raw` of every position; 0 where not needed. Without `log_noise`, `config.mixes_uniformly` leaves `total` 0."""
    return _run(config, kernel, bias, positions)[0]


def _run(config: networks.NetworkConfig, kernel: Array, bias: Array, positions: _Positions) -> tuple[Raw, Array]:
    batch, tensor = sharding.mapped_axes(len(positions.xt))
    run = functools.partial(_summarize_part, config, tensor)
    tokens = PartitionSpec(batch)
    in_specs = (PartitionSpec(None, tensor), PartitionSpec(tensor), tokens)
    return sharding.per_device(run, in_specs, tokens)(kernel.astype(positions.features.dtype), bias, positions)


def _summarize_forward(
    config: networks.NetworkConfig, kernel: Array, bias: Array, positions: _Positions
) -> tuple[Raw, Any]:
    raw, slope = _run(config, kernel, bias, positions)
    return raw, (kernel, bias, positions, raw, slope)


def _summarize_backward(config: networks.NetworkConfig, residuals: Any, gradient: Raw) -> tuple[Any, ...]:
    kernel, bias, positions, raw, slope = residuals
    batch, tensor = sharding.mapped_axes(len(positions.xt))
    run = functools.partial(_gradient_part, config, (batch, tensor))
    tokens = PartitionSpec(batch)
    in_specs = (PartitionSpec(None, tensor), PartitionSpec(tensor), *(tokens,) * 3)
    out_specs = (tiles.kernel_spec(batch, tensor), PartitionSpec(tensor), tokens)
    of_kernel, of_bias, of_features = sharding.per_device(run, in_specs, out_specs)(
        kernel.astype(positions.features.dtype), bias, positions, raw, through_softmax(config, raw, slope, gradient)
    )
    return of_kernel, of_bias, _Positions(of_features, None, None, None, None)  # pyrefly: ignore[bad-argument-type]


_summarize.defvjp(_summarize_forward, _summarize_backward)


def through_softmax(config: networks.NetworkConfig, raw: Raw, slope: Array | None, gradient: Raw) -> Raw:
    """The gradient of `Raw` with that of `total` passed on to the sum of the softmax in it.

    Args:
        config: says whether there is a softmax in `total`.
        raw: the values.
        slope: derivative of `total` in the log odds; see `mixed_sums`.
        gradient: the gradient of `raw`.
    """
    if not config.mixes_uniformly:
        return gradient
    assert slope is not None
    whole, of_whole = jnp.logaddexp(raw.logsumexp, raw.at_xt), gradient.total * slope
    return gradient._replace(
        logsumexp=gradient.logsumexp - of_whole * jnp.exp(raw.logsumexp - whole),
        at_xt=gradient.at_xt - of_whole * jnp.exp(raw.at_xt - whole),
    )


def mixed_sums(
    z: Float[Array, "r v"], log_odds: Float[Array, " r"], others: Bool[Array, "r v"]
) -> tuple[Float[Array, " r"], Float[Array, " r"]]:
    """Sums over y != xt of log(1 + N r_y / (e^sigma - 1)), and of its derivative in the log odds.

    Args:
        z: logits.
        log_odds: log(N / (e^sigma - 1)) minus the logsumexp of all logits.
        others: which states are not xt.
    """
    mixed = z + log_odds[:, None]
    keep = lambda x: jnp.where(others, x, 0.0).sum(-1)
    return keep(jax.nn.softplus(mixed)), keep(jax.nn.sigmoid(mixed))


def of_whole_rows(
    config: networks.NetworkConfig,
    states: tiles.States,
    z: Float[Array, "r v"],
    tokens: tuple[Int[Array, " r"], Int[Array, " r"]],
    sigma: Float[Array, " r"],
) -> tuple[Raw, Float[Array, " r"] | None, Float[Array, " r"] | None]:
    """`Raw` of rows whose logits over all states are in one tile; `tokens` are xt and x0.

    Also returns the slope of its total (`mixed_sums`) and log(N / (e^sigma - 1)) with `config.mixes_uniformly`.
    """
    xt, x0 = tokens
    others, at = states.other_than(xt), lambda x: jnp.where(states.equal_to(x), z, 0.0).sum(-1)
    top = jnp.where(others, z, NEVER).max(-1)
    logsumexp = top + jnp.log(jnp.where(others, jnp.exp(z - top[:, None]), 0.0).sum(-1))
    if not config.mixes_uniformly:
        return Raw(logsumexp, jnp.where(others, z, 0.0).sum(-1), at(x0), jnp.zeros_like(logsumexp)), None, None
    at_xt, noise = at(xt), log_noise(config, sigma, xt[:, None])[:, 0]
    total, slope = mixed_sums(z, noise - jnp.logaddexp(logsumexp, at_xt), others)
    return Raw(logsumexp, total, at(x0), at_xt), slope, noise


def logit_gradient(
    config: networks.NetworkConfig,
    states: tiles.States,
    z: Float[Array, "r v"],
    tokens: tuple[Int[Array, " r"], Int[Array, " r"]],
    raw: Raw,
    log_noise: Float[Array, " r"] | None,
    gradient: Raw,
) -> Float[Array, "r v"]:
    """The gradient of the logits z, given that of `Raw` after `through_softmax`; `tokens` are xt and x0."""
    xt, x0 = tokens
    by = jax.tree.map(lambda x: x[:, None], gradient)
    of_total, of_xt = by.total, 0.0
    if config.mixes_uniformly:
        assert log_noise is not None
        log_odds = log_noise - jnp.logaddexp(raw.logsumexp, raw.at_xt)
        of_total = by.total * jax.nn.sigmoid(z + log_odds[:, None])
        of_xt = jnp.where(states.equal_to(xt), by.at_xt, 0.0)
    share = jnp.exp(z - raw.logsumexp[:, None])
    of_z = jnp.where(states.other_than(xt), by.logsumexp * share + of_total, of_xt)
    return of_z + jnp.where(states.equal_to(x0), by.at_x0, 0.0)


def _summarize_part(
    config: networks.NetworkConfig, tensor: tuple[str, ...], kernel: Array, bias: Array, positions: _Positions
) -> tuple[Raw, Array]:
    """`Raw` and the slope of its total (`mixed_sums`) for one device's sequences.

    Parts of the vocabulary are combined over the `tensor` axes.
    """
    rows, vocabulary = _make_tiles(config, tensor, kernel, bias, positions.is_needed)
    features, xt, x0 = (rows.gather(x) for x in positions[:3])

    def over_tiles(body: Any, sums: Any) -> Any:
        """`body(states, logits, xt, chunk, sums of these rows)` for every tile."""

        def visit_block(k: Int[Array, ""], sums: Any) -> Any:
            states = vocabulary.block(k)

            def visit(i: Int[Array, ""], sums: Any) -> Any:
                chunk = functools.partial(rows.chunk, i=i)
                new = body(states, states.logits(chunk(features)), chunk, jax.tree.map(chunk, sums))
                return jax.tree.map(lambda x, new: tiles.put(x, new, i), sums, new)

            return rows.visit(visit, sums)

        return jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, sums)

    def add(states: tiles.States, z: Array, chunk: Any, sums: Any) -> Any:
        top, mass, total, at_x0, at_xt = sums
        others, at = states.other_than(chunk(xt)), lambda x: jnp.where(states.equal_to(chunk(x)), z, 0.0).sum(-1)
        new_top = jnp.maximum(top, jnp.where(others, z, NEVER).max(-1))
        mass = mass * jnp.exp(top - new_top) + jnp.where(others, jnp.exp(z - new_top[:, None]), 0.0).sum(-1)
        if config.mixes_uniformly:
            return new_top, mass, total, at_x0 + at(x0), at_xt + at(xt)
        return new_top, mass, total + jnp.where(others, z, 0.0).sum(-1), at_x0 + at(x0), at_xt

    zeros = jnp.zeros(len(rows.order))
    top, mass, total, at_x0, at_xt = over_tiles(add, (zeros + NEVER, zeros, zeros, zeros, zeros))
    largest, slope = jax.lax.pmax(top, tensor), zeros
    mass, at_x0, at_xt = jax.lax.psum((mass * jnp.exp(top - largest), at_x0, at_xt), tensor)
    logsumexp = jnp.where(mass > 0, largest + jnp.log(jnp.where(mass > 0, mass, 1.0)), 0.0)
    if config.mixes_uniformly and positions.log_noise is not None:
        log_odds = rows.gather(positions.log_noise) - jnp.logaddexp(logsumexp, at_xt)

        def mix(states: tiles.States, z: Array, chunk: Any, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, mixed_sums(z, chunk(log_odds), states.other_than(chunk(xt))))

        total, slope = over_tiles(mix, (zeros, zeros))
    total, slope = jax.lax.psum((total, slope), tensor)
    found = Raw(logsumexp, total, at_x0, at_xt), slope
    return jax.tree.map(lambda x: rows.scatter(x, positions.xt.shape), found)


def _gradient_part(
    config: networks.NetworkConfig,
    axes: tuple[tuple[str, ...], tuple[str, ...]],
    kernel: Array,
    bias: Array,
    positions: _Positions,
    raw: Raw,
    gradient: Raw,
) -> tuple[Array, Array, Array]:
    """Gradients of kernel, bias and features, given those of one device's summary. It computes the logits again."""
    batch, tensor = axes
    rows, vocabulary = _make_tiles(config, tensor, kernel, bias, positions.is_needed)
    f, *inputs = jax.tree.map(rows.gather, (*positions[:3], raw, positions.log_noise, gradient))
    product = functools.partial(jnp.dot, precision=vocabulary.precision, preferred_element_type=jnp.float32)

    def visit_block(k: Int[Array, ""], sums: Any) -> Any:
        of_kernel, of_bias, of_f = sums
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], sums: Any) -> Any:
            of_block, of_block_bias, of_f = sums
            f_chunk, xt, x0, *others = jax.tree.map(lambda x: rows.chunk(x, i), (f, *inputs))
            of_z = logit_gradient(config, states, states.logits(f_chunk), (xt, x0), *others)
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
    return tiles.add_kernels(of_kernel, batch), jax.lax.psum(of_bias, batch), of_features
