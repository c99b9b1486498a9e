"""The sampling engine: a batch of sequences, each of which may be at a different step.

For lists of prompts this is continuous batching: a slot whose sequence is finished takes the next one, so no slot
waits. In a plain batch all sequences are at the same step. Draws of different slots and iterations are independent, so
a sequence has the same distribution as in a batch of its own.

In one iteration every sequence takes a step, or a corrector step that repeats it. The iteration after a sequence's last
step denoises it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from sedd_jax.diffusion import forward
from sedd_jax.model import controls, networks
from sedd_jax.reverse import samplers, steps
from sedd_jax.runtime import sharding
from sedd_jax.sampling import constraints, draws

KEPT = 16  # Programs of rules that were used last are kept. Each takes tens of megabytes.


class Rules(NamedTuple):
    """How all sequences are filled. Programs are compiled for each value of it.

    Attributes:
        process: the forward process.
        sampler: how the forward process is reversed.
        control: how the distribution of each token is changed.
        draw: precision of the sampling noise, a name in `score_draws.DRAWS`.
        eos_id: id of the end-of-text token; a sequence is finished once it has drawn one and has no mask before it.
            None if no token ends a sequence.
        pads: whether attention ignores what follows a sequence's own length.
        is_together: whether all sequences are at the same step; then `finish` makes their last evaluation.
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
        """Iterations per step: the step, and its corrector steps."""
        return 1 + self.sampler.corrector_steps


class Sequences(NamedTuple):
    """Sequences to be filled, one for each of the B slots.

    Attributes:
        given: known tokens. Positions after a sequence's end count as known where they must not be filled.
        lengths: number of tokens of each sequence that are wanted.
        num_steps: steps of each sequence before its last evaluation.
        is_busy: whether the slot has a sequence.
        places: positions of gaps with patterns; None if no sequence has any.
    """

    given: steps.Given
    lengths: Int[Array | np.ndarray, "B"]
    num_steps: Int[Array | np.ndarray, "B"]
    is_busy: Bool[Array | np.ndarray, "B"]
    places: constraints.Places | None


class Slots(NamedTuple):
    """The sequences that are being filled, each in its slot; attributes as in `Sequences`, and one more.

    Attributes:
        batch: the sequences as samplers see them: known tokens, states, iterations and steps.
    """

    batch: steps.Batch
    lengths: Int[Array, "B"]
    is_busy: Bool[Array, "B"]
    places: constraints.Places | None


class Programs(NamedTuple):
    """Compiled functions that run on the devices.

    Attributes:
        begin_fn: (key_limit, key_plan, sequences) -> slots; see `begin`.
        put_fn: (key, slots, is_new, sequences) -> slots; see `put`.
        advance_fn: ((parameters, automaton of the patterns), key, slots, start, stop) -> see `advance`.
        finish_fn: ((parameters, automaton), key, key of the last evaluation, slots) -> clean tokens.
    """

    begin_fn: Callable[..., Slots]
    put_fn: Callable[..., Slots]
    advance_fn: Callable[..., tuple[Array, Slots, Array]]
    finish_fn: Callable[..., Int[Array, "B L"]]


def nobody(shape: tuple[int, int], *, has_patterns: bool = False) -> Sequences:
    """Empty slots, [B, L] = `shape`; `has_patterns` says whether later sequences may have gaps with patterns."""
    none, tokens = jnp.zeros(shape[0], jnp.int32), jnp.zeros(shape, jnp.int32)
    places = constraints.Places(tokens - 1, tokens > 0, tokens > 0) if has_patterns else None
    given = steps.Given(tokens, jnp.ones(shape, bool))
    return Sequences(given, none, none, jnp.zeros(shape[0], bool), places)


def begin(key_limit: Key[Array, ""], key_plan: Key[Array, ""], rules: Rules, sequences: Sequences) -> Slots:
    """Puts sequences at the start of their trajectories.

    Args:
        key_limit: key of the tokens that they start with.
        key_plan: key of what the sampler draws beforehand.
        rules: how sequences are filled.
        sequences: what is known of each.
    """
    given = sequences.given
    xt = given.clamp(rules.process.graph.sample_limit(key_limit, given.tokens.shape))
    plan = rules.sampler.begin(key_plan, rules.process, given)
    num_steps = jnp.asarray(sequences.num_steps)
    batch = steps.Batch(given, xt, jnp.zeros_like(num_steps), num_steps, plan)
    return Slots(batch, jnp.asarray(sequences.lengths), jnp.asarray(sequences.is_busy), sequences.places)


def put(key: Key[Array, ""], rules: Rules, slots: Slots, is_new: Bool[Array, "B"], sequences: Sequences) -> Slots:
    """Puts new sequences, at the start of their trajectories, into the slots where `is_new`; or empties these slots."""
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

    With `rules.is_together`, iterations go on to `stop`, or until the sampler has nothing left to do.

    Args:
        key: key of all iterations. Each folds in its number, so any split into calls gives the same tokens.
        rules: how sequences are filled.
        draws_fn: slots -> the network, as the sampler calls it.
        slots: the sequences that are being filled.
        start: number of the first iteration. It is traced, as `stop` is, so one compilation serves any number of steps.
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
        batch = batch._replace(xt=xt, iteration=batch.iteration + _takes_part(rules, slots))
        return number + 1, slots._replace(batch=batch)

    number, slots = jax.lax.while_loop(goes_on, take, (jnp.asarray(start), slots))
    return number, slots, is_finished(rules, slots)


def _has_work(rules: Rules, slots: Slots) -> Bool[Array, ""]:
    if not rules.is_together:
        return slots.is_busy.any() & ~is_finished(rules, slots).any()
    return _is_unfilled(rules, slots).any() if rules.sampler.traits.ends_with_masks else jnp.asarray(True)


def _takes_part(rules: Rules, slots: Slots) -> Bool[Array, "B"]:
    """Which sequences an iteration counts for: if their number is adaptive, not for those that are filled."""
    is_adaptive = rules.is_together and rules.sampler.traits.is_adaptive
    return slots.is_busy & _is_unfilled(rules, slots).any(1) if is_adaptive else slots.is_busy


def _is_unfilled(rules: Rules, slots: Slots) -> Bool[Array, "B L"]:
    """Positions that a sampler with `ends_with_masks` still has to fill: masks.

    While a sequence is between a step and the last of its corrector steps, all its positions count.
    """
    batch = slots.batch
    is_mask = batch.given.is_movable(rules.process.graph, batch.xt)
    return is_mask | (batch.iteration % rules.repeats > 0)[:, None]


def is_finished(rules: Rules, slots: Slots) -> Bool[Array, "B"]:
    """Which sequences are finished: their last evaluation is made, or no wanted token can change any more.

    On a graph with a mask and without corrector steps, a drawn token stays. So a sequence is finished once no mask is
    left; masks after the wanted tokens, or after a drawn end of text, do not count. In all other cases a sequence is
    finished early only if it has no gap, or if the sampler `ends_with_masks` and none is left.
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


@functools.lru_cache(maxsize=KEPT)
def make_programs(
    network: networks.NetworkConfig, rules: Rules, size_of_patterns: tuple[int, int] | None = None
) -> Programs:
    """The programs of a network; each compiles once for each number of slots and each length.

    Args:
        network: the network.
        rules: how sequences are filled.
        size_of_patterns: `size` of the automaton of patterns; None if there are none. Each size has programs of its
            own, so that the bound of this cache bounds the memory of all of them.
    """

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
            # An empty slot, or one that is about to be emptied, has no tokens, but attention needs one.
            lengths=jnp.maximum(slots.lengths, 1) if rules.pads else None,
        )
        return own.draws

    def finish(inputs, key, key_last, slots):
        return sharding.replicate(
            rules.sampler.finish(key, key_last, draws_of(inputs, slots), rules.process, slots.batch)
        )

    # Results are replicated, so that all processes see the same slots and decide alike.
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
