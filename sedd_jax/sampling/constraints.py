"""Draws the tokens of a gap so that its text matches a pattern: an automaton over tokens, and draws that it accepts.

Tokens that lead from every state to the same state form a class. Positions of a gap are independent: the joint
distribution of their classes is a product. Classes are drawn from this product, given that the automaton ends in an
accepting state. Messages go from the last position to the first, then draws go from the first to the last. This is
exact, as for any hidden Markov model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.model import categoricals
from sedd_jax.sampling import regexes

_FEWEST_STATES = 32  # Automata with fewer are padded to it.
_LEAST = -1e4  # Lowest log weight of a class that is possible, relative to the likeliest.


class Automaton(NamedTuple):
    """Reads a text token by token. Several patterns share one automaton; each has its own states in it.

    Attributes:
        class_of: class of every state of the diffusion. No pattern allows the class of the mask.
        next_state: the automaton's state after a token of each class; `regexes.DEAD` leads only to itself.
        is_accepting: in which states a text may end.
    """

    class_of: Int[Array | np.ndarray, "V"]
    next_state: Int[Array | np.ndarray, "S C"]
    is_accepting: Bool[Array | np.ndarray, "S"]

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of states and of classes, on which the shapes of arrays depend."""
        num_states, num_classes = self.next_state.shape
        return num_states, num_classes

    @property
    def num_classes(self) -> int:
        return self.next_state.shape[1]


class Places(NamedTuple):
    """Positions of the gaps with a pattern. Each gap is contiguous.

    Attributes:
        start: the state in which a pattern starts, at the first position of its gap; -1 elsewhere.
        is_last: which positions are the last of a gap.
        is_constrained: which positions are in a gap.
    """

    start: Int[Array | np.ndarray, "*B L"]
    is_last: Bool[Array | np.ndarray, "*B L"]
    is_constrained: Bool[Array | np.ndarray, "*B L"]


class Patterns(NamedTuple):
    """The patterns that the text of gaps must match, and the positions of these gaps."""

    automaton: Automaton
    places: Places


def pad(automaton: Automaton) -> Automaton:
    """The automaton with more states, which nothing reaches: a power of two of them, at least 32.

    A program is compiled for every number of states and classes. Draws do not depend on the number of states, so that
    patterns with as many classes share a few programs. They do depend on the number of classes.
    """
    num_states = len(automaton.is_accepting)
    more = max(_FEWEST_STATES, 1 << (num_states - 1).bit_length()) - num_states
    return automaton._replace(
        next_state=np.pad(automaton.next_state, ((0, more), (0, 0)), constant_values=regexes.DEAD),
        is_accepting=np.pad(automaton.is_accepting, (0, more)),
    )


def pin(
    log_weights: Float[Array, "B L C"], automaton: Automaton, xt: Int[Array, "B L"], is_known: Bool[Array, "B L"]
) -> Float[Array, "B L C"]:
    """Log weights where known tokens are fixed: 0 for the class of the token, minus infinity for all other classes."""
    own = jnp.asarray(automaton.class_of)[xt][..., None] == jnp.arange(automaton.num_classes)[None, None]
    return jnp.where(is_known[..., None], jnp.where(own, 0.0, -jnp.inf), log_weights)


def choose_classes(
    key: Key[Array, ""], log_weights: Float[Array, "B L C"], automaton: Automaton, places: Places
) -> Int[Array, "B L"]:
    """Draws the classes of all gaps with a pattern, from the product of the positions given that every pattern matches.

    Classes that match are drawn however small their weight is. Only a log weight of minus infinity forbids a class; a
    log weight more than 10000 below the likeliest counts as 10000 below. Work and memory of a position are [B, S, C].

    Args:
        key: random key.
        log_weights: log weights of the classes at each position, up to a constant; see `pin`. They are read only
            where `is_constrained`.
        automaton: the patterns.
        places: positions of the gaps, [B, L] each.

    Returns:
        The class of each position; -1 where no pattern applies, and everywhere in a gap whose known tokens contradict
        its pattern.
    """
    log_weights = jnp.where(log_weights > -jnp.inf, jnp.maximum(categoricals.relative(log_weights), _LEAST), -jnp.inf)
    # The scans run over positions.
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
    """Log probabilities that the rest of the gap matches, from each state before a position, and after it.

    Those before the position are up to a constant.
    """
    last = jnp.where(automaton.is_accepting, 0.0, -jnp.inf)[None]
    after = jnp.where(places.is_last[:, None], last, message)
    before = jax.nn.logsumexp(log_weights[:, None] + after[:, automaton.next_state], axis=-1)
    return categoricals.relative(before), after  # Only differences matter; float32 keeps them if values are small.


def _draw(
    automaton: Automaton,
    state: Int[Array, "B"],
    key: Key[Array, ""],
    after: Float[Array, "B S"],
    log_weights: Float[Array, "B C"],
    places: Places,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Draws the class of a position, given the state before it. Returns the state after it, and the class."""
    state = jnp.where(places.start >= 0, places.start, state)
    following = jnp.asarray(automaton.next_state)[state]
    log_weights = log_weights + jnp.take_along_axis(after, following, axis=-1)
    is_possible = (log_weights > -jnp.inf).any(-1) & places.is_constrained
    chosen = categoricals.draw(key, jnp.exp(categoricals.relative(log_weights)))
    moved = jnp.take_along_axis(following, chosen[:, None], axis=-1)[:, 0]
    return jnp.where(is_possible, moved, regexes.DEAD), jnp.where(is_possible, chosen, -1)
