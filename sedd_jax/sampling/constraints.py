"""Drawing a gap so that its text matches a pattern: an automaton over tokens, and the joint law that it leaves.

Tokens that lead from every state to the same one are a class. A class at each position of a gap is drawn from the
product of the positions' laws, given that the gap ends where a text may end: messages go from the last position to the
first, draws from the first to the last. This is exact, as for any hidden Markov model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.model import categoricals
from sedd_jax.sampling import regexes

_LEAST = -1e4  # Of a class that is possible, against the likeliest.


class Automaton(NamedTuple):
    """Reads a text token by token; several patterns are one automaton with states of their own.

    Attributes:
        class_of: the class of every state of the diffusion, the mask's being one that no pattern allows.
        next_state: the state after a token of each class; `regexes.DEAD` stays so.
        is_accepting: where a text may end.
    """

    class_of: Int[Array | np.ndarray, "V"]
    next_state: Int[Array | np.ndarray, "S C"]
    is_accepting: Bool[Array | np.ndarray, "S"]

    @property
    def num_classes(self) -> int:
        return self.next_state.shape[1]


class Places(NamedTuple):
    """Where gaps with a pattern are, each an unbroken stretch.

    Attributes:
        start: the state in which a pattern starts, at the first position of its gap; -1 elsewhere.
        is_last: the last positions of gaps.
        is_constrained: all their positions.
    """

    start: Int[Array | np.ndarray, "*B L"]
    is_last: Bool[Array | np.ndarray, "*B L"]
    is_constrained: Bool[Array | np.ndarray, "*B L"]


class Patterns(NamedTuple):
    """What the text of gaps is to match, and where they are."""

    automaton: Automaton
    places: Places


def pin(
    log_weights: Float[Array, "B L C"], automaton: Automaton, xt: Int[Array, "B L"], is_known: Bool[Array, "B L"]
) -> Float[Array, "B L C"]:
    """The log weights of classes with those of known tokens: 0 for their own class, minus infinity for others."""
    own = jnp.asarray(automaton.class_of)[xt][..., None] == jnp.arange(automaton.num_classes)[None, None]
    return jnp.where(is_known[..., None], jnp.where(own, 0.0, -jnp.inf), log_weights)


def choose_classes(
    key: Key[Array, ""], log_weights: Float[Array, "B L C"], automaton: Automaton, places: Places
) -> Int[Array, "B L"]:
    """Draws the classes of all gaps with a pattern, from their product given that every pattern is matched.

    What is drawn matches however small its weight is: minus infinity alone forbids a class, and less than e^-10000 of
    the likeliest counts as that. Work and memory of a position are [B, S, C].

    Args:
        key: random key.
        log_weights: of the classes at each position, up to a constant; see `pin`. Read where `is_constrained`.
        automaton: the patterns.
        places: [B, L] each.

    Returns:
        The classes; -1 where no pattern applies, and in the whole of a gap that no text can fill, since what is known
        of it contradicts the pattern.
    """
    log_weights = jnp.where(log_weights > -jnp.inf, jnp.maximum(categoricals.relative(log_weights), _LEAST), -jnp.inf)
    # Scans go over positions.
    by_position = jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 1, 0), (log_weights, places))
    _, messages = jax.lax.scan(
        lambda message, inputs: _message(automaton, message, *inputs),
        jnp.zeros((log_weights.shape[0], automaton.next_state.shape[0])),
        by_position,
        reverse=True,
    )
    keys = jax.random.split(key, log_weights.shape[1])
    _, classes = jax.lax.scan(
        lambda state, inputs: _draw(automaton, state, *inputs),
        jnp.full(log_weights.shape[0], regexes.DEAD, jnp.int32),
        (keys, messages, *by_position),
    )
    return classes.T


def _message(
    automaton: Automaton, message: Float[Array, "B S"], log_weights: Float[Array, "B C"], places: Places
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Log probabilities that the rest of the gap matches, from each state before a position and after it."""
    last = jnp.where(automaton.is_accepting, 0.0, -jnp.inf)[None]
    after = jnp.where(places.is_last[:, None], last, message)
    before = jax.nn.logsumexp(log_weights[:, None] + after[:, automaton.next_state], axis=-1)
    return categoricals.relative(before), after  # Only differences matter, and small numbers keep them.


def _draw(
    automaton: Automaton,
    state: Int[Array, "B"],
    key: Key[Array, ""],
    after: Float[Array, "B S"],
    log_weights: Float[Array, "B C"],
    places: Places,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The state after a position, and its class, from the state before it."""
    state = jnp.where(places.start >= 0, places.start, state)
    following = jnp.asarray(automaton.next_state)[state]
    log_weights = log_weights + jnp.take_along_axis(after, following, axis=-1)
    is_possible = (log_weights > -jnp.inf).any(-1) & places.is_constrained
    chosen = categoricals.draw(key, jnp.exp(categoricals.relative(log_weights)))
    moved = jnp.take_along_axis(following, chosen[:, None], axis=-1)[:, 0]
    return jnp.where(is_possible, moved, regexes.DEAD), jnp.where(is_possible, chosen, -1)
