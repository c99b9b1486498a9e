"""A batch whose sequences are at steps of their own: one that is finished makes room for the next, so none waits.

A turn is one step of every sequence, whichever is its own; the step after a sequence's last one is `samplers.denoise`.
Draws of different places and turns are independent, so a sequence has the law that it has in a batch of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from sedd_jax import config as configs
from sedd_jax.diffusion import first_hitting, graphs, noise_schedules, samplers, time_grids, trapezoidal
from sedd_jax.sampling import constraints


class Model(NamedTuple):
    """The network and what is drawn from it.

    Attributes:
        evaluate_fn: see `trapezoidal.predictor`.
        draw_fn: (key, features, xt, sigma, positions that may move, law of the step) -> xt after it.
        leap_fn: see `trapezoidal.predictor`.
    """

    evaluate_fn: trapezoidal.EvaluateFn
    draw_fn: Callable[..., Int[Array, "B L"]]
    leap_fn: trapezoidal.LeapFn


class Slots(NamedTuple):
    """The sequences in work, each in its place.

    Attributes:
        given: known tokens; what is behind a sequence's end counts as known where it must not be filled.
        lengths: tokens of each sequence that are asked for.
        num_steps: steps of each before its last evaluation.
        number: turns that each has taken.
        is_busy: whether there is a sequence in the place.
        xt: their states.
        course: what `first_hitting` draws beforehand; None for other samplers.
        places: of gaps with patterns; None where no sequence has any.
    """

    given: samplers.Given
    lengths: Int[Array, "B"]
    num_steps: Int[Array, "B"]
    number: Int[Array, "B"]
    is_busy: Bool[Array, "B"]
    xt: Int[Array, "B L"]
    course: first_hitting.Course | None
    places: constraints.Places | None


class Rules(NamedTuple):
    """What all sequences have in common.

    Attributes:
        graph: the forward process.
        noise: the schedule.
        settings: the sampler; its numbers of steps and samples do not count.
        eos_id: the end of text whose drawing finishes a sequence; None where none does.
    """

    graph: graphs.Graph
    noise: noise_schedules.NoiseSchedule
    settings: configs.SamplingConfig
    eos_id: int | None

    @property
    def turns(self) -> int:
        """Turns of a step."""
        return 1 + self.settings.corrector_steps


def empty(rules: Rules, shape: tuple[int, int], *, has_patterns: bool = False) -> Slots:
    """No sequence in any place; `has_patterns` says whether there will be gaps with patterns."""
    num_slots = shape[0]
    none, tokens = jnp.zeros(num_slots, jnp.int32), jnp.zeros(shape, jnp.int32)
    course = None
    if rules.settings.sampler == first_hitting.NAME:
        course = first_hitting.Course(none, tokens, jnp.zeros(shape))
    places = constraints.Places(tokens - 1, tokens > 0, tokens > 0) if has_patterns else None
    given = samplers.Given(tokens, jnp.ones(shape, bool))
    return Slots(given, none, none, none, jnp.zeros(num_slots, bool), tokens, course, places)


def put(
    key: Key[Array, ""],
    rules: Rules,
    slots: Slots,
    is_new: Bool[Array, "B"],
    given: samplers.Given,
    lengths: Int[Array, "B"],
    num_steps: Int[Array, "B"],
    is_busy: Bool[Array, "B"],
    places: constraints.Places | None = None,
) -> Slots:
    """Puts other sequences, at the start of their trajectories, or none, where `is_new`.

    Args:
        key: of what they start with.
        rules: how they are filled.
        slots: the sequences in work.
        is_new: places that change.
        given: see `Slots`, as all that follow.
        lengths: of the new ones.
        num_steps: of the new ones.
        is_busy: whether there is a new one.
        places: of their gaps with patterns.
    """
    key_limit, key_course = jax.random.split(key)
    course = None
    if slots.course is not None:
        assert isinstance(rules.graph, graphs.Absorbing)
        course = first_hitting.draw_course(key_course, rules.graph, rules.noise, given)
    xt = given.clamp(rules.graph.sample_limit(key_limit, given.tokens.shape))
    new = Slots(given, lengths, num_steps, jnp.zeros_like(lengths), is_busy, xt, course, places)
    return jax.tree.map(lambda new, old: _where(is_new, new, old), new, slots)


def advance(
    key: Key[Array, ""],
    rules: Rules,
    model_fn: Callable[[Slots], Model],
    slots: Slots,
    start: Int[Array, ""],
    stop: Int[Array, ""],
) -> tuple[Int[Array, ""], Slots, Bool[Array, "B"]]:
    """Takes the turns from `start` on until a sequence is finished, all places are empty, or turn `stop` is next.

    Args:
        key: of all turns, each of which folds its number in.
        rules: how sequences are filled.
        model_fn: the network for the sequences in work.
        slots: the sequences in work.
        start: number of the first turn.
        stop: number of the turn to stop before.

    Returns:
        The number of the next turn, the sequences, and which of them are finished.
    """

    def goes_on(carry: tuple[Int[Array, ""], Slots]) -> Array:
        number, slots = carry
        return (number < stop) & slots.is_busy.any() & ~is_finished(rules, slots).any()

    def take(carry: tuple[Int[Array, ""], Slots]) -> tuple[Int[Array, ""], Slots]:
        number, slots = carry
        xt = _turn(key, rules, model_fn(slots), slots, number)
        taken = slots._replace(xt=_where(slots.is_busy, xt, slots.xt), number=slots.number + slots.is_busy)
        return number + 1, taken

    number, slots = jax.lax.while_loop(goes_on, take, (start, slots))
    return number, slots, is_finished(rules, slots)


def is_finished(rules: Rules, slots: Slots) -> Bool[Array, "B"]:
    """Whether nothing that is asked for can change any more: the last step is taken, or no mask is left.

    Masks behind what is asked for, or behind a drawn end of text, do not count, since a token that is drawn stays.
    Where corrector steps draw it again, and on the uniform graph, only the last step and the lack of gaps count.
    """
    may_move = ~slots.given.is_given
    left = may_move
    if isinstance(rules.graph, graphs.Absorbing) and rules.turns == 1:
        left = may_move & rules.graph.is_noise(slots.xt) & (jnp.arange(left.shape[1])[None] < slots.lengths[:, None])
        if rules.eos_id is not None:
            is_end = may_move & (slots.xt == rules.eos_id)
            left &= jnp.cumsum(is_end, axis=1) == 0
    elif rules.settings.sampler == first_hitting.NAME:
        left = may_move & rules.graph.is_noise(slots.xt) | (slots.number % rules.turns > 0)[:, None]
    return slots.is_busy & (~left.any(1) | (slots.number > slots.num_steps * rules.turns))


def _turn(key: Key[Array, ""], rules: Rules, model: Model, slots: Slots, number: Int[Array, ""]) -> Int[Array, "B L"]:
    graph, noise, given, turns = rules.graph, rules.noise, slots.given, rules.turns
    sampler = rules.settings.sampler
    is_last = slots.number >= slots.num_steps * turns

    def move(key, xt, sigma, is_movable, jump_fn):
        return model.draw_fn(key, model.evaluate_fn(xt, sigma), xt, sigma, is_movable, jump_fn)

    if slots.course is not None:
        assert isinstance(graph, graphs.Absorbing)
        return first_hitting.turn(
            key, slots.course, number, move, graph, given, slots.xt, slots.number, slots.num_steps, turns=turns
        )
    if sampler == trapezoidal.NAME:
        leap = _denoising_leap(model, graph, is_last)
        step = trapezoidal.predictor(model.evaluate_fn, leap, graph, noise, given)
    else:
        step = samplers.predictor(_denoising_move(move, graph, is_last), graph, noise, given, sampler=sampler)

    def predict(key, xt, t, dt):
        return step(key, xt, jnp.where(is_last, time_grids.T_END, t), dt)

    key = jax.random.fold_in(key, number)
    return samplers.turn(
        key,
        predict,
        graph,
        noise,
        given,
        slots.xt,
        slots.number,
        slots.num_steps,
        grid=rules.settings.grid,
        turns=turns,
    )


def _denoising_move(move_fn: samplers.MoveFn, graph: graphs.Graph, is_last: Bool[Array, "B"]) -> samplers.MoveFn:
    """`move_fn` with the law of `samplers.denoise` for sequences at their last evaluation."""

    def move(key, xt, sigma, is_movable, jump_fn):
        def law(total):
            last, other = graph.denoise_jump(total, xt, sigma), jump_fn(total)
            if last.offset is not None or other.offset is not None:
                last, other = (jump._replace(offset=_or_zeros(jump.offset, total)) for jump in (last, other))
            return jax.tree.map(lambda last, other: _where(is_last, last, other), last, other)

        return move_fn(key, xt, sigma, is_movable, law)

    return move


def _denoising_leap(model: Model, graph: graphs.Graph, is_last: Bool[Array, "B"]) -> trapezoidal.LeapFn:
    """The leaps of `model`; sequences at their last evaluation take `samplers.denoise` in place of the first."""

    def leap(key, rates, xt, is_movable):
        key_leap, key_last = jax.random.split(key)
        moved = model.leap_fn(key_leap, rates, xt, is_movable & ~is_last[:, None])
        if len(rates) > 1:
            return moved
        (first,) = rates
        law = lambda total: graph.denoise_jump(total, xt, first.sigma)
        last = model.draw_fn(key_last, first.features, xt, first.sigma, is_movable & is_last[:, None], law)
        return _where(is_last, last, moved)

    return leap


def _or_zeros(offset: Any, like: Array) -> Array:
    return jnp.zeros_like(like) if offset is None else offset


def _where(rows: Bool[Array, "B"], x: Array, y: Array) -> Array:
    """x in the given rows, y elsewhere."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
