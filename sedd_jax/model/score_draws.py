"""Drawing the next token of every position that may move, from features, without an array over the vocabulary.

The score is summed over blocks of states. One draw decides between staying and the blocks; where it leaves, a second
one, over the states of that block alone, decides the token. Both are `categoricals.draw`, so both are precise.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs
from sedd_jax.model import categoricals, networks, score_heads, tiles
from sedd_jax.runtime import sharding

BLOCK_STATES = 2048
# Positions whose states are drawn at once: few move in a step.
DRAWN_ROWS = 16


class Choice(NamedTuple):
    """Which tokens the positions that move get, where that is not the law of the step; see `controls`.

    Attributes:
        fn: (vocabulary, features, xt, log scale, is_movable, slope, offset, keys, moves, *arrays) -> xt after it.
        arrays: [B, L, ...] each.
    """

    fn: Callable[..., Int[Array, "B L"]]
    arrays: tuple[Any, ...]


def draw(
    key: Key[Array, ""],
    config: networks.NetworkConfig,
    params: networks.Params,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    is_movable: Bool[Array, "B L"],
    jump_fn: Callable[[Float[Array, "B L"]], graphs.Jump],
    choice: Choice | None = None,
) -> Int[Array, "B L"]:
    """Draws the next state of every position where `is_movable`; the others keep theirs.

    The same law as `categoricals.draw` of `jump_fn(total).weights(score, xt)`; the head runs at movable positions only.

    Args:
        key: of this step.
        config: sizes of the network.
        params: its parameters.
        features: its output.
        xt: current states.
        sigma: total noise of each sequence.
        is_movable: where the state may change.
        jump_fn: from the sum of the score over all y != xt to the law of the step.
        choice: which token a position gets that moves; None for the law of the step.
    """
    log_scale = score_heads.scale_needed(config, params, features, xt, sigma, is_movable)
    blocks = functools.partial(over_head, config, params, features[:, :, None], xt, log_scale[..., None], is_movable)
    sums = blocks(_block_sums, jnp.ones((*xt.shape, 1)), None)
    jump = jump_fn(sums.sum(-1))
    slope = jump.slope[..., None]
    # With an offset, weights clipped at 0 are no multiple of the score: another pass sums them.
    sums = slope * sums if jump.offset is None else blocks(_block_sums, slope, jump.offset)
    return _draw_from_sums(key, blocks, sums, jump.stay, slope, jump.offset, xt, is_movable, choice)


def leap(
    key: Key[Array, ""],
    config: networks.NetworkConfig,
    params: networks.Params,
    evaluations: Sequence[tuple[Float[Array, "B L D"], Float[Array, "B"], Float[Array, "B L"]]],
    xt: Int[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    *,
    draw: str,
    choice: Choice | None = None,
) -> Int[Array, "B L"]:
    """Draws the state of every movable position after a leap whose rates are a sum over evaluations of the network.

    A position stays with probability exp(-total rate), else jumps in proportion to the rates; those below 0 count as 0.

    Args:
        key: of this leap.
        config: sizes of the network.
        params: its parameters.
        evaluations: features, total noise, and what the score is multiplied by, of each.
        xt: current states; the score of any other state is that of going there.
        is_movable: where the state may change.
        draw: a name in `DRAWS`.
        choice: which token a position gets that moves; None for the law of the rates.
    """
    features, sigmas, slopes = zip(*evaluations, strict=True)
    scales = [
        score_heads.scale_needed(config, params, f, xt, sigma, is_movable)
        for f, sigma in zip(features, sigmas, strict=True)
    ]
    slope = jnp.stack(slopes, axis=-1)
    blocks = functools.partial(
        over_head, config, params, jnp.stack(features, axis=2), xt, jnp.stack(scales, axis=-1), is_movable
    )
    sums = blocks(_block_sums, slope, None)
    total = sums.sum(-1)
    share = jnp.where(total > 0, -jnp.expm1(-total) / jnp.where(total > 0, total, 1.0), 0.0)
    if draw == "published":
        keys = jax.random.key_data(_position_keys(key, xt))
        return blocks(_race, share[..., None] * slope, None, jnp.exp(-total), keys)
    return _draw_from_sums(key, blocks, share[..., None] * sums, jnp.exp(-total), slope, None, xt, is_movable, choice)


def draw_published(
    key: Key[Array, ""],
    config: networks.NetworkConfig,
    params: networks.Params,
    features: Float[Array, "B L D"],
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    is_movable: Bool[Array, "B L"],
    jump_fn: Callable[[Float[Array, "B L"]], graphs.Jump],
) -> Int[Array, "B L"]:
    """`draw` as the published PyTorch program does it, truncated noise included; for comparison only.

    Every state runs a race of its own (`categoricals.race_published`), so this needs noise for all of them.
    """
    log_scale = score_heads.scale_needed(config, params, features, xt, sigma, is_movable)
    blocks = functools.partial(over_head, config, params, features[:, :, None], xt, log_scale[..., None], is_movable)
    jump = jump_fn(blocks(_block_sums, jnp.ones((*xt.shape, 1)), None).sum(-1))
    keys = jax.random.key_data(_position_keys(key, xt))
    return blocks(_race, jump.slope[..., None], jump.offset, jump.stay, keys)


DRAWS = {"precise": draw, "published": draw_published}


def _draw_from_sums(
    key: Key[Array, ""],
    blocks: Callable[..., Any],
    sums: Float[Array, "B L k"],
    stay: Float[Array, "B L"],
    slope: Float[Array, "B L E"],
    offset: Float[Array, "B L"] | None,
    xt: Int[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    choice: Choice | None,
) -> Int[Array, "B L"]:
    """Draws between staying and the blocks of states, whose weights are summed, then a state of the block."""
    key_block, key_state = jax.random.split(key)
    options = jnp.concatenate([sums, stay[..., None]], axis=-1)
    block = jnp.where(is_movable, categoricals.draw(key_block, options), sums.shape[-1])
    keys = jax.random.key_data(_position_keys(key_state, xt))
    if choice is None:
        return blocks(_draw_states, slope, offset, keys, block)
    return blocks(choice.fn, slope, offset, keys, block < sums.shape[-1], *choice.arrays)


def _position_keys(key: Key[Array, ""], xt: Int[Array, "B L"]) -> Key[Array, "B L"]:
    """A key for every position, whatever device it is on."""
    places = jnp.arange(xt.size).reshape(xt.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, places)


def over_head(
    config: networks.NetworkConfig,
    params: networks.Params,
    features: Float[Array, "B L E D"],
    xt: Int[Array, "B L"],
    log_scale: Float[Array, "B L E"],
    is_movable: Bool[Array, "B L"],
    fn: Callable[..., Any],
    *arrays: Any,
) -> Any:
    """Calls fn(vocabulary, features, xt, log_scale, is_movable, *arrays) for each device's positions and all states."""
    width = min(BLOCK_STATES, config.padded_states)

    def run(kernel: Array, bias: Array, *arrays: Any) -> Any:
        return fn(tiles.Vocabulary(kernel, bias, 0, config.num_states, width), *arrays)

    tokens = PartitionSpec(sharding.mapped_axes(len(xt))[0])
    inputs = (features, xt, log_scale, is_movable, *arrays)
    specs = (PartitionSpec(), PartitionSpec(), *(tokens,) * len(inputs))
    return sharding.per_device(run, specs, tokens)(
        params["head_kernel"].astype(features.dtype), params["head_bias"], *inputs
    )


def weights(
    states: tiles.States,
    features: Float[Array, "r E D"],
    xt: Int[Array, " r"],
    log_scale: Float[Array, "r E"],
    slope: Float[Array, "r E"],
    offset: Float[Array, " r"] | None,
) -> Float[Array, "r v"]:
    """Weights of the states y != xt of a block, a sum over E evaluations and the offset, at least 0; and 0 for xt."""
    found = (slope[..., None] * jnp.exp(states.logits(features) + log_scale[..., None])).sum(1)
    if offset is not None:
        found = found + offset[:, None]
    return jnp.where(states.other_than(xt), jnp.maximum(found, 0.0), 0.0)


def _block_sums(
    vocabulary: tiles.Vocabulary, features: Any, xt: Any, log_scale: Any, is_movable: Any, slope: Any, offset: Any
) -> Float[Array, "B L k"]:
    """The sum of the weights over every block, 0 where nothing moves."""
    rows = tiles.choose(is_movable, _chunk_size(is_movable))
    inputs = gather(rows, (features, xt, log_scale, slope, offset))

    def visit_block(k: Int[Array, ""], sums: Float[Array, "n k"]) -> Float[Array, "n k"]:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], sums: Float[Array, "n k"]) -> Float[Array, "n k"]:
            of_chunk = weights(states, *_chunk(rows, inputs, i))
            return jax.lax.dynamic_update_slice(sums, of_chunk.sum(-1, keepdims=True), (i, k))

        return rows.visit(visit, sums)

    sums = jnp.zeros((len(rows.order), vocabulary.num_blocks))
    return rows.scatter(jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, sums), xt.shape)


def _draw_states(
    vocabulary: tiles.Vocabulary,
    features: Any,
    xt: Any,
    log_scale: Any,
    is_movable: Any,
    slope: Any,
    offset: Any,
    keys: Any,
    block: Int[Array, "B L"],
) -> Int[Array, "B L"]:
    """Draws a state of the chosen block for every position that chose one."""
    del is_movable  # Positions that stay have chosen no block.
    inputs = (features, xt, log_scale, slope, offset)

    def visit_block(k: Int[Array, ""], xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        rows = tiles.choose(block == k, min(xt.size, DRAWN_ROWS))

        def visit(i: Int[Array, ""], flat: Int[Array, " n"]) -> Int[Array, " n"]:
            chunk = tiles.Rows(rows.chunk(rows.order, i), rows.count, rows.size)
            states = vocabulary.block(k)
            of_chunk = weights(states, *gather(chunk, inputs))
            row_keys = jax.random.wrap_key_data(chunk.gather(keys))
            tokens = states.ids[jax.vmap(categoricals.draw)(row_keys, of_chunk)]
            return flat.at[chunk.order].set(tokens.astype(flat.dtype), mode="drop")

        return rows.visit(visit, xt.reshape(-1)).reshape(xt.shape)

    return jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, xt)


def _race(
    vocabulary: tiles.Vocabulary,
    features: Any,
    xt: Any,
    log_scale: Any,
    is_movable: Any,
    slope: Any,
    offset: Any,
    stay: Any,
    keys: Any,
) -> Int[Array, "B L"]:
    """The winner of the published race over all states."""
    rows = tiles.choose(is_movable, _chunk_size(is_movable))
    inputs = gather(rows, (features, xt, log_scale, slope, offset))
    stay, row_keys = rows.gather(stay), rows.gather(keys)

    def visit_block(k: Int[Array, ""], best: Any) -> Any:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], best: Any) -> Any:
            value, token = (rows.chunk(x, i) for x in best)
            chunk = _chunk(rows, inputs, i)
            of_chunk = jnp.where(states.equal_to(chunk[1]), rows.chunk(stay, i)[:, None], weights(states, *chunk))
            block_keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(rows.chunk(row_keys, i)), k)
            race = jnp.where(
                states.ids[None] >= 0, jax.vmap(categoricals.race_published)(block_keys, of_chunk), -jnp.inf
            )
            winner = race.argmax(-1)
            new = jnp.take_along_axis(race, winner[:, None], axis=-1)[:, 0]
            better = (jnp.where(new > value, new, value), jnp.where(new > value, states.ids[winner], token))
            return jax.tree.map(lambda x, y: tiles.put(x, y, i), best, better)

        return rows.visit(visit, best)

    start = (jnp.full(len(rows.order), -jnp.inf), jnp.zeros(len(rows.order), jnp.int32))
    _, winners = jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, start)
    return jnp.where(is_movable, rows.scatter(winners, xt.shape), xt)


def _chunk_size(is_movable: Bool[Array, "B L"]) -> int:
    return tiles.chunk_size(is_movable.size, score_heads.TILE_ROWS[sharding.platform()])


def gather(rows: tiles.Rows, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The chosen rows of arrays [B, L, ...]; None stays None."""
    return jax.tree.map(rows.gather, arrays)


def _chunk(rows: tiles.Rows, arrays: tuple[Any, ...], i: Int[Array, ""]) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: rows.chunk(x, i), arrays)
