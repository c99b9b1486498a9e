"""Draws the next token of every position that may move, from features, without an array over the vocabulary.

The score is summed over each block of states. A first draw decides between staying and one of the blocks. If it picks a
block, a second draw picks the token among the states of that block. Both use `categoricals.draw`, so both are precise.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import scores
from sedd_jax.model import categoricals, layers, networks, score_heads, tiles
from sedd_jax.reverse import steps
from sedd_jax.runtime import sharding

# States in a block. On a CPU its logits fit in caches. Elsewhere one block has all states: each further one would cost
# small kernels, and waits in which the host reads how many positions chose it.
BLOCK_STATES = {"cpu": 2048, "gpu": 1 << 20, "tpu": 1 << 20}
# Most logits in a tile of some positions by a block.
TILE_LOGITS = {"cpu": 1 << 20, "gpu": 1 << 28, "tpu": 1 << 27}
# Positions that draw their states at the same time; few positions move in a step.
DRAWN_ROWS = {"cpu": 16, "gpu": 128, "tpu": 128}


class Weights(NamedTuple):
    """The weight of every state at each position, as a formula instead of an array over states.

    The weight of y != xt is max(sum_e slope_e exp(z_e(y) + log_scale_e) + offset, 0), where z_e is the head's output
    for the features of evaluation e, of E. The weight of xt is 0.

    Attributes:
        features: features from E evaluations of the network.
        xt: current states.
        log_scale: added to the head's output; see `score_heads.Scale`.
        slope: factor of each score.
        offset: added to the sum; None if it is 0 everywhere.
    """

    features: Float[Array, "*p E D"]
    xt: Int[Array, "*p"]
    log_scale: Float[Array, "*p E"]
    slope: Float[Array, "*p E"]
    offset: Float[Array, "*p"] | None = None

    def of(self, states: tiles.States) -> Float[Array, "r v"]:
        """The weights of a block of v states, for r positions gathered as rows."""
        found = (self.slope[..., None] * jnp.exp(states.logits(self.features) + self.log_scale[..., None])).sum(1)
        if self.offset is not None:
            found = found + self.offset[:, None]
        return jnp.where(states.other_than(self.xt), jnp.maximum(found, 0.0), 0.0)


# Runs on one device's sequences: (vocabulary, weights, *arrays [B, L, ...]) -> [B, L, ...].
VisitFn = Callable[..., Any]


class Choice(NamedTuple):
    """How positions that move get their token, if not from the distribution of the step; see `controls`.

    Attributes:
        fn: (vocabulary, weights, keys, which positions move, *arrays) -> the next xt.
        arrays: further inputs of `fn`, [B, L, ...] each, or None.
    """

    fn: VisitFn
    arrays: tuple[Any, ...]


def draw(
    key: Key[Array, ""],
    model: networks.Model,
    evaluation: steps.Evaluation,
    xt: Int[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    jump_fn: steps.JumpFn,
    choice: Choice | None = None,
) -> Int[Array, "B L"]:
    """Draws the next state of every position where `is_movable`; all others keep theirs.

    The distribution is that of `categoricals.draw` from `jump_fn(total).weights(score, xt)`. The head runs at movable
    positions only.

    Args:
        key: key of this step.
        model: the network.
        evaluation: its output, and the total noise of each sequence.
        xt: current states.
        is_movable: where the state may change.
        jump_fn: sum of the score over all y != xt -> weights of the step.
        choice: how a position that moves gets its token; None for the distribution of the step.
    """
    weights = _score(model, evaluation, xt, is_movable)
    sums = over_head(model, _block_sums, weights, is_movable)
    jump = jump_fn(sums.sum(-1))
    weights = _of_jump(weights, jump)
    # With an offset, the weights are clipped at 0 and no multiple of the score, so another pass sums them.
    sums = weights.slope * sums if jump.offset is None else over_head(model, _block_sums, weights, is_movable)
    return _draw_from_sums(key, model, weights, sums, jump.stay, is_movable, choice)


def leap(
    key: Key[Array, ""],
    model: networks.Model,
    rates: Sequence[steps.Rates],
    xt: Int[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    *,
    draw: str,
    choice: Choice | None = None,
) -> Int[Array, "B L"]:
    """Draws the state of every movable position after a leap; rates are a sum over evaluations of the network.

    A position stays with probability exp(-total rate). Otherwise it jumps, with probabilities in proportion to the
    rates. Rates below 0 count as 0.

    Args:
        key: key of this leap.
        model: the network.
        rates: rates from each evaluation, to be added up.
        xt: current states.
        is_movable: where the state may change.
        draw: precision of the sampling noise, a name in `DRAWS`.
        choice: how a position that moves gets its token; None for the distribution of the rates.
    """
    scales = [
        score_heads.scale_needed(model, one.evaluation.features, xt, one.evaluation.sigma, is_movable) for one in rates
    ]
    weights = Weights(
        features=jnp.stack([one.evaluation.features for one in rates], axis=2),
        xt=xt,
        log_scale=jnp.stack([scale.log_scale for scale in scales], axis=-1),
        slope=jnp.stack([one.slope for one in rates], axis=-1),
        offset=_sum(
            [one.slope * scale.shift for one, scale in zip(rates, scales, strict=True) if scale.shift is not None]
        ),
    )
    sums = over_head(model, _block_sums, weights, is_movable)
    total = sums.sum(-1)
    share = jnp.where(total > 0, -jnp.expm1(-total) / jnp.where(total > 0, total, 1.0), 0.0)[..., None]
    if draw == "published":
        keys = jax.random.key_data(position_keys(key, xt))
        offset = None if weights.offset is None else share[..., 0] * weights.offset
        weights = weights._replace(slope=share * weights.slope, offset=offset)
        return over_head(model, _race, weights, is_movable, jnp.exp(-total), keys)
    return _draw_from_sums(key, model, weights, share * sums, jnp.exp(-total), is_movable, choice)


def draw_published(
    key: Key[Array, ""],
    model: networks.Model,
    evaluation: steps.Evaluation,
    xt: Int[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    jump_fn: steps.JumpFn,
) -> Int[Array, "B L"]:
    """`draw` as the published PyTorch program does it, with its truncated noise; for comparison only.

    It needs noise for every state at every movable position (`categoricals.race_published`).
    """
    weights = _score(model, evaluation, xt, is_movable)
    jump = jump_fn(over_head(model, _block_sums, weights, is_movable).sum(-1))
    keys = jax.random.key_data(position_keys(key, xt))
    weights = _of_jump(weights, jump)
    return over_head(model, _race, weights, is_movable, jump.stay, keys)


def entropies(
    model: networks.Model, evaluation: steps.Evaluation, xt: Int[Array, "B L"], is_needed: Bool[Array, "B L"]
) -> Float[Array, "B L"]:
    """Entropy in nats of the token y != xt whose probability is in proportion to the score; 0 where not `is_needed`."""
    features = evaluation.features[:, :, None]
    weights = Weights(features, xt, jnp.zeros((*xt.shape, 1)), jnp.ones((*xt.shape, 1)))
    return over_head(model, _entropies, weights, is_needed)


def margins(
    model: networks.Model, evaluation: steps.Evaluation, xt: Int[Array, "B L"], is_needed: Bool[Array, "B L"]
) -> Float[Array, "B L"]:
    """By how much the likeliest token of a position, given all others, is likelier than the next; 0 if not needed.

    Probabilities are in proportion to the score, which is 1 at the current token (graphs without a mask).
    """
    return over_head(model, _margins, _score(model, evaluation, xt, is_needed), is_needed)


DRAWS = {"precise": draw, "published": draw_published}


def _score(
    model: networks.Model, evaluation: steps.Evaluation, xt: Int[Array, "B L"], is_movable: Bool[Array, "B L"]
) -> Weights:
    """The score itself as `Weights`, slope 1."""
    scale = score_heads.scale_needed(model, evaluation.features, xt, evaluation.sigma, is_movable)
    one = jnp.ones((*xt.shape, 1))
    return Weights(evaluation.features[:, :, None], xt, scale.log_scale[..., None], one, scale.shift)


def _sum(terms: list[Float[Array, "B L"]]) -> Float[Array, "B L"] | None:
    """The sum of the terms; None if there are none."""
    return functools.reduce(jnp.add, terms) if terms else None


def _of_jump(weights: Weights, jump: scores.Jump) -> Weights:
    """The weights of a step, from those of the score."""
    own = None if weights.offset is None else jump.slope * weights.offset
    return weights._replace(
        slope=jump.slope[..., None], offset=_sum([term for term in (own, jump.offset) if term is not None])
    )


def _draw_from_sums(
    key: Key[Array, ""],
    model: networks.Model,
    weights: Weights,
    sums: Float[Array, "B L k"],
    stay: Float[Array, "B L"],
    is_movable: Bool[Array, "B L"],
    choice: Choice | None,
) -> Int[Array, "B L"]:
    """Draws first between staying and the k blocks, whose weights are `sums`, then a state of the block."""
    key_block, key_state = jax.random.split(key)
    options = jnp.concatenate([sums, stay[..., None]], axis=-1)
    block = jnp.where(is_movable, categoricals.draw(key_block, options), sums.shape[-1])
    keys = jax.random.key_data(position_keys(key_state, weights.xt))
    if choice is None:
        return over_head(model, _draw_states, weights, keys, block)
    return over_head(model, choice.fn, weights, keys, block < sums.shape[-1], *choice.arrays)


def position_keys(key: Key[Array, ""], xt: Int[Array, "B L"]) -> Key[Array, "B L"]:
    """A key for every position; it does not depend on how positions are split over devices."""
    places = jnp.arange(xt.size).reshape(xt.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, places)


def over_head(model: networks.Model, fn: VisitFn, weights: Weights, *arrays: Any) -> Any:
    """Calls fn(vocabulary, weights, *arrays) on each device, for its sequences and all states.

    Args:
        model: the model whose head gives the vocabulary.
        fn: the function to call.
        weights: weights of every position.
        arrays: further inputs, [B, L, ...] each, or None.

    Returns:
        What `fn` returns, [B, L, ...].
    """
    config, features = model.config, weights.features
    width = min(BLOCK_STATES[sharding.platform()], config.padded_states)

    def run(kernel: Array, bias: Array, weights: Weights, *arrays: Any) -> Any:
        vocabulary = tiles.Vocabulary(kernel, bias, 0, config.num_states, width, layers.precision(config.dtype))
        return fn(vocabulary, weights, *arrays)

    tokens = PartitionSpec(sharding.mapped_axes(len(features))[0])
    specs = (PartitionSpec(), PartitionSpec(), *(tokens,) * (1 + len(arrays)))
    return sharding.per_device(run, specs, tokens)(
        model.params["head_kernel"].astype(features.dtype), model.params["head_bias"], weights, *arrays
    )


def _block_sums(vocabulary: tiles.Vocabulary, weights: Weights, is_movable: Bool[Array, "B L"]) -> Array:
    """Sum of the weights over each of the k blocks, [B, L, k]; 0 where not `is_movable`."""
    rows = tiles.choose(is_movable, _chunk_size(is_movable, vocabulary.width))
    gathered = gather(rows, weights)

    def visit_block(k: Int[Array, ""], sums: Float[Array, "n k"]) -> Float[Array, "n k"]:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], sums: Float[Array, "n k"]) -> Float[Array, "n k"]:
            of_chunk = _chunk(rows, gathered, i).of(states)
            return jax.lax.dynamic_update_slice(sums, of_chunk.sum(-1, keepdims=True), (i, k))

        return rows.visit(visit, sums)

    sums = jnp.zeros((len(rows.order), vocabulary.num_blocks))
    return rows.scatter(jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, sums), is_movable.shape)


def _fold(
    vocabulary: tiles.Vocabulary, weights: Weights, is_needed: Bool[Array, "B L"], start: tuple[float, ...], step: Any
) -> tuple[Float[Array, "B L"], ...]:
    """`tiles.fold` with step(states, weights of a chunk, numbers of its positions) -> new numbers."""
    rows = tiles.choose(is_needed, _chunk_size(is_needed, vocabulary.width))
    gathered = gather(rows, weights)
    found = tiles.fold(vocabulary, rows, start, lambda states, i, *x: step(states, _chunk(rows, gathered, i), x))
    return tuple(rows.scatter(x, is_needed.shape) for x in found)


def _entropies(vocabulary: tiles.Vocabulary, weights: Weights, is_needed: Bool[Array, "B L"]) -> Array:
    """log sum_y e^z - sum_y z e^z / sum_y e^z over all y != xt, [B, L]; 0 where not `is_needed`."""

    def step(states: tiles.States, chunk: Weights, found: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, weighted = found
        z = jnp.where(states.other_than(chunk.xt), states.logits(chunk.features)[:, 0], score_heads.NEVER)
        top = jnp.maximum(largest, z.max(-1))
        shift, share = largest - top, jnp.exp(z - top[:, None])
        # Of what is relative to the largest logit so far, now relative to the new one.
        weighted = jnp.exp(shift) * (weighted + shift * total) + ((z - top[:, None]) * share).sum(-1)
        return top, jnp.exp(shift) * total + share.sum(-1), weighted

    _, total, weighted = _fold(vocabulary, weights, is_needed, (score_heads.NEVER, 0.0, 0.0), step)
    total = jnp.where(total > 0, total, 1.0)
    return jnp.log(total) - weighted / total


def _margins(vocabulary: tiles.Vocabulary, weights: Weights, is_needed: Bool[Array, "B L"]) -> Array:
    """Share of the largest weight less that of the second, [B, L]; 0 where not `is_needed`."""

    def step(states: tiles.States, chunk: Weights, found: tuple[Array, ...]) -> tuple[Array, ...]:
        first, second, total = found
        of_chunk = chunk.of(states)
        top = of_chunk.max(-1)
        is_top = jnp.arange(of_chunk.shape[1])[None] == of_chunk.argmax(-1)[:, None]
        after = jnp.maximum(jnp.where(is_top, 0.0, of_chunk).max(-1), jnp.minimum(first, top))
        return jnp.maximum(first, top), jnp.maximum(second, after), total + of_chunk.sum(-1)

    # The current token has weight 1.
    first, second, total = _fold(vocabulary, weights, is_needed, (1.0, 0.0, 1.0), step)
    return (first - second) / jnp.where(is_needed, total, 1.0)


def _draw_states(vocabulary: tiles.Vocabulary, weights: Weights, keys: Array, block: Int[Array, "B L"]) -> Array:
    """Draws a state of the block that each position has chosen. Positions that stay have chosen none: they keep xt."""

    def visit_block(k: Int[Array, ""], xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        rows = tiles.choose(block == k, drawn_rows(xt.size))

        def visit(i: Int[Array, ""], flat: Int[Array, " n"]) -> Int[Array, " n"]:
            chunk = tiles.Rows(rows.chunk(rows.order, i), rows.count, rows.size)
            states = vocabulary.block(k)
            of_chunk = gather(chunk, weights).of(states)
            row_keys = jax.random.wrap_key_data(chunk.gather(keys))
            tokens = states.ids[jax.vmap(categoricals.draw)(row_keys, of_chunk)]
            return flat.at[chunk.order].set(tokens.astype(flat.dtype), mode="drop")

        return rows.visit(visit, xt.reshape(-1)).reshape(xt.shape)

    return jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, weights.xt)


def _race(
    vocabulary: tiles.Vocabulary, weights: Weights, is_movable: Bool[Array, "B L"], stay: Array, keys: Array
) -> Array:
    """The state with the largest `categoricals.race_published` value at each movable position; xt elsewhere."""
    rows = tiles.choose(is_movable, _chunk_size(is_movable, vocabulary.width))
    gathered = gather(rows, weights)
    stay, row_keys = rows.gather(stay), rows.gather(keys)

    def visit_block(k: Int[Array, ""], best: Any) -> Any:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], best: Any) -> Any:
            value, token = (rows.chunk(x, i) for x in best)
            chunk = _chunk(rows, gathered, i)
            of_chunk = jnp.where(states.equal_to(chunk.xt), rows.chunk(stay, i)[:, None], chunk.of(states))
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
    return jnp.where(is_movable, rows.scatter(winners, is_movable.shape), weights.xt)


def whole_rows(num_positions: int, num_states: int) -> int:
    """Number of positions in a tile of all states, where many positions need one."""
    platform = sharding.platform()
    return min(num_positions, max(DRAWN_ROWS[platform], TILE_LOGITS[platform] // num_states))


def drawn_rows(num_positions: int) -> int:
    """Number of positions that draw their states at the same time."""
    return min(num_positions, DRAWN_ROWS[sharding.platform()])


def _chunk_size(is_movable: Bool[Array, "B L"], width: int) -> int:
    platform = sharding.platform()
    return tiles.chunk_size(is_movable.size, min(score_heads.TILE_ROWS[platform], TILE_LOGITS[platform] // width))


def gather(rows: tiles.Rows, arrays: Any) -> Any:
    """The chosen positions of a tree of arrays [B, L, ...], as rows [n, ...]."""
    return jax.tree.map(rows.gather, arrays)


def _chunk(rows: tiles.Rows, weights: Weights, i: Int[Array, ""]) -> Weights:
    return jax.tree.map(lambda x: rows.chunk(x, i), weights)
