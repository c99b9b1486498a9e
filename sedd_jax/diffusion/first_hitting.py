"""The first-hitting sampler (Zheng et al. 2024, arXiv 2409.02908): absorbing diffusion without steps in time.

Of n masks the next is left at a time whose law is known, at a position that is any of them alike. So one evaluation
of the network for each token draws from the reverse process itself, whatever the schedule. Here one evaluation may also
fill several masks, which is as fast as the other samplers and, like them, no longer exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs, noise_schedules, samplers, time_grids

NAME = "first_hitting"
_LAST = 2**31 - 1  # Number of the last evaluation, which no other has.
_CLOCK, _RANK, _TOKENS, _BACK = range(4)  # What a trajectory's key is folded with for each thing drawn.


class Course(NamedTuple):
    """What is drawn beforehand for whole sequences: every evaluation finds its part by the number of masks left.

    Attributes:
        num_gaps: masks at the start.
        rank: of each position; masks are left from the highest down.
        sigma: total noise at which the next mask is left, by how many there are, from 1.
    """

    num_gaps: Int[Array, "B"]
    rank: Int[Array, "B L"]
    sigma: Float[Array, "B L"]


def reverse_steps(
    key: Key[Array, ""],
    move_fn: samplers.MoveFn,
    graph: graphs.Absorbing,
    noise: noise_schedules.NoiseSchedule,
    given: samplers.Given,
    xt: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    num_steps: Int[Array, ""] | int,
    *,
    corrector_steps: int = 0,
) -> Int[Array, "B L"]:
    """Takes the evaluations `start` to `stop` of `num_steps`, after which one is left for `finish`.

    All fill even shares of a sequence's masks: one each, so that the draw is exact, where num_steps + 1 is at least
    their number. Every sequence has a clock of its own. Arguments are those of `samplers.reverse_steps`; evaluations
    that find no mask in the batch are left out. A corrector step takes as many tokens back, whichever, and fills their
    places again: of one token a Gibbs step, which keeps the law whatever was filled before.
    """
    course = draw_course(key, graph, noise, given)
    turns = 1 + corrector_steps

    def is_left(carry: tuple[Int[Array, ""], Int[Array, "B L"]]) -> Array:
        number, xt = carry
        return (number < stop * turns) & (_is_mask(graph, given, xt).any() | (number % turns > 0))

    def step(carry: tuple[Int[Array, ""], Int[Array, "B L"]]) -> tuple[Int[Array, ""], Int[Array, "B L"]]:
        number, xt = carry
        numbers = jnp.full(len(xt), number)
        steps = jnp.asarray(num_steps)
        return number + 1, turn(key, course, number, move_fn, graph, given, xt, numbers, steps, turns=turns)

    return jax.lax.while_loop(is_left, step, (jnp.asarray(start * turns), given.clamp(xt)))[1]


def turn(
    key: Key[Array, ""],
    course: Course,
    draw: Int[Array, ""],
    move_fn: samplers.MoveFn,
    graph: graphs.Absorbing,
    given: samplers.Given,
    xt: Int[Array, "B L"],
    number: Int[Array, "B"],
    num_steps: Int[Array, "*B"],
    *,
    turns: int,
) -> Int[Array, "B L"]:
    """Takes an evaluation of each sequence for the first time, or again: `turns` times each.

    Args:
        key: of the whole trajectory.
        course: of each sequence.
        draw: a number that no other call with this key has.
        move_fn: draws tokens.
        graph: the forward process.
        given: known tokens.
        xt: state before.
        number: turns that each sequence has taken.
        num_steps: one less than the evaluations that fill each sequence, or all, in shares that differ by one at most.
        turns: of a step.
    """
    # None is for nothing, where there are fewer masks than evaluations.
    evaluations = jnp.clip(course.num_gaps, 1, num_steps + 1)
    filled_before = lambda step: step * course.num_gaps // evaluations
    share = filled_before(number // turns + 1) - filled_before(number // turns)
    if turns > 1:
        taken_back = _take_back(jax.random.fold_in(_part(key, _BACK), draw), graph, given, xt, share)
        xt = jnp.where((number % turns > 0)[:, None], taken_back, xt)
    return _fill(jax.random.fold_in(_part(key, _TOKENS), draw), course, move_fn, graph, given, xt, share)


def finish(
    key: Key[Array, ""],
    move_fn: samplers.MoveFn,
    graph: graphs.Absorbing,
    noise: noise_schedules.NoiseSchedule,
    given: samplers.Given,
    xt: Int[Array, "B L"],
) -> Int[Array, "B L"]:
    """Fills all masks that are left in one evaluation; the key is that of `reverse_steps`."""
    course = draw_course(key, graph, noise, given)
    own_key = jax.random.fold_in(_part(key, _TOKENS), _LAST)
    return _fill(own_key, course, move_fn, graph, given, given.clamp(xt), course.num_gaps)


def draw_course(
    key: Key[Array, ""], graph: graphs.Absorbing, noise: noise_schedules.NoiseSchedule, given: samplers.Given
) -> Course:
    """Draws order and clock of each sequence.

    Where n masks are left at a time when a token is masked with probability m, the next goes at m u^(1/n), u uniform.
    """
    key_clock, key_rank = _part(key, _CLOCK), _part(key, _RANK)
    shape = given.tokens.shape
    num_gaps = (~given.is_given).sum(1)
    # Ranks, since two uniform numbers of so many are often the same.
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key_rank, shape), axis=1), axis=1)
    count = jnp.arange(1, shape[1] + 1)[None]
    log_decay = jnp.where(count <= num_gaps[:, None], -jax.random.exponential(key_clock, shape) / count, 0.0)
    start = jnp.log(-jnp.expm1(-noise.sigma(jnp.float32(1.0))))
    log_mask_prob = start + jnp.cumsum(log_decay[:, ::-1], axis=1)[:, ::-1]
    sigma = jnp.maximum(-jnp.log1p(-jnp.exp(log_mask_prob)), noise.sigma(jnp.float32(time_grids.T_END)))
    return Course(num_gaps, rank, sigma)


def _part(key: Key[Array, ""], part: int) -> Key[Array, ""]:
    """The key of one of the things drawn; folded, not split: every call of a trajectory has the same key."""
    return jax.random.fold_in(key, part)


def _fill(
    key: Key[Array, ""],
    course: Course,
    move_fn: samplers.MoveFn,
    graph: graphs.Absorbing,
    given: samplers.Given,
    xt: Int[Array, "B L"],
    count: Int[Array, "B"],
) -> Int[Array, "B L"]:
    """Fills the next `count` masks of each sequence, from the score at the time when the first of them is left."""
    is_mask = _is_mask(graph, given, xt)
    num_masks = is_mask.sum(1)
    sigma = jnp.take_along_axis(course.sigma, jnp.maximum(num_masks - 1, 0)[:, None], axis=1)[:, 0]
    order = jnp.where(is_mask, course.rank, -1)
    lowest = jnp.take_along_axis(jnp.sort(order, descending=True), jnp.maximum(count - 1, 0)[:, None], axis=1)
    is_next = is_mask & (order >= lowest)
    law = lambda total: graph.denoise_jump(total, xt, sigma)
    return move_fn(key, xt, sigma, is_next, law)


def _take_back(
    key: Key[Array, ""],
    graph: graphs.Absorbing,
    given: samplers.Given,
    xt: Int[Array, "B L"],
    count: Int[Array, "B"],
) -> Int[Array, "B L"]:
    """Masks `count` of the tokens that have been filled, any of them alike."""
    chance = jax.random.uniform(key, xt.shape)
    place = jnp.argsort(jnp.argsort(jnp.where(given.is_given | graph.is_noise(xt), 2.0, chance), axis=1), axis=1)
    is_filled = ~given.is_given & ~graph.is_noise(xt)
    return jnp.where(is_filled & (place < count[:, None]), graph.mask_id, xt)


def _is_mask(graph: graphs.Absorbing, given: samplers.Given, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    return graph.is_noise(xt) & ~given.is_given
