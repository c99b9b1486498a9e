"""The one engine of sampling: a batch whose sequences are at steps of their own.

For lists of prompts this is continuous batching: a slot whose sequence is finished takes the next one, so none waits.
A plain batch is the case where all sequences are at the same step. Draws of different slots and iterations are
independent, so a sequence has the distribution that it has in a batch of its own.

An iteration is a step of every sequence, or its repetition by a corrector. The iteration after a sequence's last step
denoises it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from sedd_jax.diffusion import forward, samplers, steps
from sedd_jax.model import controls, networks
from sedd_jax.runtime import sharding
from sedd_jax.sampling import constraints, draws


class Rules(NamedTuple):
    """How all sequences are filled; compiled programs are functions of it.

    Attributes:
        process: the forward process.
        sampler: how it is reversed.
        control: how the distribution of each token is changed.
        draw: precision of the sampling noise, a name in `score_draws.DRAWS`.
        eos_id: the end of text whose drawing finishes a sequence; None where none does.
        pads: whether nobody attends to what follows a sequence's own length.
        is_together: whether all sequences are at the same step, and `finish` takes their last evaluation.
    """

    process: forward.Process
    sampler: samplers.Sampler
    control: controls.Control = controls.Control()
    draw: str = "precise"
    eos_id: int | None = None
    pads: bool = False
    is_together: bool = False

    @property
    def repeats(self) -> int:
        """Iterations of a step."""
        return 1 + self.sampler.corrector_steps


class Sequences(NamedTuple):
    """Sequences to be filled.

    Attributes:
        given: known tokens; what is behind a sequence's end counts as known where it must not be filled.
        lengths: tokens of each sequence that are asked for.
        num_steps: steps of each before its last evaluation.
        is_busy: whether there is a sequence in the slot.
        places: of gaps with patterns; None where no sequence has any.
    """

    given: steps.Given
    lengths: Int[Array | np.ndarray, "B"]
    num_steps: Int[Array | np.ndarray, "B"]
    is_busy: Bool[Array | np.ndarray, "B"]
    places: constraints.Places | None


class Slots(NamedTuple):
    """The sequences in work, each in its slot; attributes as in `Sequences`.

    Attributes:
        batch: their states, as samplers see them.
    """

    batch: steps.Batch
    lengths: Int[Array, "B"]
    is_busy: Bool[Array, "B"]
    places: constraints.Places | None


class Programs(NamedTuple):
    """What runs on the devices.

    Attributes:
        begin_fn: (key of the limit, key of plans, sequences) -> slots, as `begin`.
        put_fn: (key, slots, which are new, sequences) -> slots, as `put`.
        advance_fn: ((parameters, patterns' automaton), key, slots, start, stop) -> as `advance`.
        finish_fn: (the same two, key, key of the last evaluation, slots) -> clean tokens.
    """

    begin_fn: Callable[..., Slots]
    put_fn: Callable[..., Slots]
    advance_fn: Callable[..., tuple[Array, Slots, Array]]
    finish_fn: Callable[..., Int[Array, "B L"]]


def nobody(shape: tuple[int, int], *, has_patterns: bool = False) -> Sequences:
    """No sequence in any slot; `has_patterns` says whether there will be gaps with patterns."""
    none, tokens = jnp.zeros(shape[0], jnp.int32), jnp.zeros(shape, jnp.int32)
    places = constraints.Places(tokens - 1, tokens > 0, tokens > 0) if has_patterns else None
    given = steps.Given(tokens, jnp.ones(shape, bool))
    return Sequences(given, none, none, jnp.zeros(shape[0], bool), places)


def begin(key_limit: Key[Array, ""], key_plan: Key[Array, ""], rules: Rules, sequences: Sequences) -> Slots:
    """Sequences at the start of their trajectories.

    Args:
        key_limit: of what they start with.
        key_plan: of what the sampler draws beforehand.
        rules: how they are filled.
        sequences: what is known of them.
    """
    given = sequences.given
    xt = given.clamp(rules.process.graph.sample_limit(key_limit, given.tokens.shape))
    plan = rules.sampler.begin(key_plan, rules.process, given)
    num_steps = jnp.asarray(sequences.num_steps)
    batch = steps.Batch(given, xt, jnp.zeros_like(num_steps), num_steps, plan)
    return Slots(batch, jnp.asarray(sequences.lengths), jnp.asarray(sequences.is_busy), sequences.places)


def put(key: Key[Array, ""], rules: Rules, slots: Slots, is_new: Bool[Array, "B"], sequences: Sequences) -> Slots:
    """Puts other sequences, at the start of their trajectories, or none, into the slots where `is_new`."""
    key_limit, key_plan = jax.random.split(key)
    new = begin(key_limit, key_plan, rules, sequences)
    return jax.tree.map(lambda new, old: steps.where(is_new, new, old), new, slots)


def advance(
    key: Key[Array, ""],
    rules: Rules,
    draws_fn: Callable[[Slots], steps.Draws],
    slots: Slots,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
) -> tuple[Int[Array, ""], Slots, Bool[Array, "B"]]:
    """Takes iterations until a sequence is finished, all slots are empty, or iteration `stop` is next.

    Sequences that are together go on to `stop`, or until their sampler has nothing left to do.

    Args:
        key: of all iterations, each of which folds its number in, so that any split into calls gives the same tokens.
        rules: how sequences are filled.
        draws_fn: the network for the sequences in work.
        slots: the sequences in work.
        start: number of the first iteration; traced, as `stop` is: one compilation serves every number of steps.
        stop: number of the iteration to stop before.

    Returns:
        The number of the next iteration, the sequences, and which of them are finished.
    """

    def goes_on(carry: tuple[Int[Array, ""], Slots]) -> Array:
        number, slots = carry
        return (number < stop) & _has_work(rules, slots)

    def take(carry: tuple[Int[Array, ""], Slots]) -> tuple[Int[Array, ""], Slots]:
        number, slots = carry
        batch = slots.batch
        is_last = None if rules.is_together else batch.iteration >= batch.num_steps * rules.repeats
        xt = rules.sampler.take(key, number, draws_fn(slots), rules.process, batch, is_last)
        if not rules.is_together:
            xt = steps.where(slots.is_busy, xt, batch.xt)
        batch = batch._replace(xt=xt, iteration=batch.iteration + slots.is_busy)
        return number + 1, slots._replace(batch=batch)

    number, slots = jax.lax.while_loop(goes_on, take, (jnp.asarray(start), slots))
    return number, slots, is_finished(rules, slots)


def _has_work(rules: Rules, slots: Slots) -> Bool[Array, ""]:
    if not rules.is_together:
        return slots.is_busy.any() & ~is_finished(rules, slots).any()
    return _is_unfilled(rules, slots).any() if rules.sampler.traits.ends_with_masks else jnp.asarray(True)


def _is_unfilled(rules: Rules, slots: Slots) -> Bool[Array, "B L"]:
    """Where a mask is left to a sampler that ends with them, or all of a sequence that a corrector has begun with."""
    batch = slots.batch
    is_mask = ~batch.given.is_given & rules.process.graph.is_noise(batch.xt)
    return is_mask | (batch.iteration % rules.repeats > 0)[:, None]


def is_finished(rules: Rules, slots: Slots) -> Bool[Array, "B"]:
    """Whether nothing that is asked for can change any more: the last step is taken, or no mask is left.

    Masks behind what is asked for, or behind a drawn end of text, do not count, since a token that is drawn stays.
    Where corrector steps draw it again, and without a mask, only the last step and the lack of gaps count.
    """
    batch, graph = slots.batch, rules.process.graph
    may_move = ~batch.given.is_given
    left = may_move
    if graph.has_mask and rules.repeats == 1:
        left = may_move & graph.is_noise(batch.xt) & (jnp.arange(left.shape[1])[None] < slots.lengths[:, None])
        if rules.eos_id is not None:
            is_end = may_move & (batch.xt == rules.eos_id)
            left &= jnp.cumsum(is_end, axis=1) == 0
    elif rules.sampler.traits.ends_with_masks:
        left = _is_unfilled(rules, slots)
    return slots.is_busy & (~left.any(1) | (batch.iteration > batch.num_steps * rules.repeats))


@functools.lru_cache(maxsize=32)
def make_programs(network: networks.NetworkConfig, rules: Rules) -> Programs:
    """The programs of a network, compiled once for each number of slots and length."""

    def draws_of(inputs: tuple[networks.Params, constraints.Automaton | None], slots: Slots) -> steps.Draws:
        params, automaton = inputs
        own = draws.NetworkDraws(
            model=networks.Model(network, params),
            graph=rules.process.graph,
            given=slots.batch.given,
            patterns=None
            if automaton is None or slots.places is None
            else constraints.Patterns(automaton, slots.places),
            control=rules.control,
            draw=rules.draw,
            # A slot that is empty, or waits to be emptied, has no tokens, but attention needs one.
            lengths=jnp.maximum(slots.lengths, 1) if rules.pads else None,
        )
        return own.draws

    def finish(inputs, key, key_last, slots):
        return sharding.replicate(
            rules.sampler.finish(key, key_last, draws_of(inputs, slots), rules.process, slots.batch)
        )

    # Every process holds all of it, and all decide alike.
    whole = functools.partial(jax.tree.map, sharding.replicate)
    return Programs(
        begin_fn=jax.jit(lambda key_limit, key_plan, sequences: whole(begin(key_limit, key_plan, rules, sequences))),
        put_fn=jax.jit(lambda key, slots, *new: whole(put(key, rules, slots, *new))),
        advance_fn=jax.jit(
            lambda inputs, key, slots, start, stop: whole(
                advance(key, rules, functools.partial(draws_of, inputs), slots, start, stop)
            )
        ),
        finish_fn=jax.jit(finish),
    )
