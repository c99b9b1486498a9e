"""What losses and reverse steps need of the score, instead of its array over all states.

A loss reads three numbers per position (`ScoreSummary`). A reverse step is a `Jump`: the weight of staying, and how the
weights of all other states follow from the score. So no array of shape [B, L, V] has to exist.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class ScoreSummary(NamedTuple):
    """The three numbers per position that score entropy needs.

    Attributes:
        logsumexp: log of the sum of the score over all y != xt.
        mean: mean of log score over all V states; the current token counts as 0.
        at_x0: log score of the clean token.
    """

    logsumexp: Float[Array, "B L"]
    mean: Float[Array, "B L"]
    at_x0: Float[Array, "B L"]


def summarize(log_score: Float[Array, "B L V"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]) -> ScoreSummary:
    """The `ScoreSummary` of a whole array of log scores, for vocabularies small enough to hold it."""
    current = is_state(xt, log_score.shape[-1])
    others = jnp.where(current, -jnp.inf, log_score)
    return ScoreSummary(
        logsumexp=jax.nn.logsumexp(others, axis=-1),
        mean=jnp.where(current, 0.0, log_score).sum(-1) / log_score.shape[-1],
        at_x0=jnp.take_along_axis(log_score, x0[..., None], axis=-1)[..., 0],
    )


class Jump(NamedTuple):
    """The distribution that a reverse step draws each position's next state from, without its array over states.

    The weight of xt is `stay`, and that of any other y is slope score_y + offset. Negative weights count as 0.

    Attributes:
        stay: weight of xt.
        slope: factor of the score.
        offset: added to slope score_y; None if it is 0 everywhere.
        is_clean: where the next state is a clean token of the uniform graph. There a state that is no possible clean
            token has only the weight of a rounding error; draws under a pattern leave it out. None if nowhere.
    """

    stay: Float[Array, "B L"]
    slope: Float[Array, "B L"]
    offset: Float[Array, "B L"] | None = None
    is_clean: Bool[Array, "B L"] | None = None

    def weights(self, score: Float[Array, "B L V"], xt: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """The whole array of weights, for vocabularies small enough to hold it."""
        offset = 0.0 if self.offset is None else self.offset[..., None]
        moved = self.slope[..., None] * score + offset
        return jnp.where(is_state(xt, score.shape[-1]), self.stay[..., None], moved)


def where(rows: Bool[Array, "B"], one: Jump, other: Jump) -> Jump:
    """`one` for the sequences in `rows`, `other` for the others."""
    for name, dtype in (("offset", one.stay.dtype), ("is_clean", bool)):
        if getattr(one, name) is not None or getattr(other, name) is not None:
            one, other = (
                jump._replace(**{name: jnp.zeros(jump.stay.shape, dtype)}) if getattr(jump, name) is None else jump
                for jump in (one, other)
            )
    return jax.tree.map(lambda x, y: jnp.where(rows[:, None], x, y), one, other)


def is_state(x: Int[Array, "B L"], num_states: int) -> Bool[Array, "B L V"]:
    """The one-hot array of states, as booleans."""
    return x[..., None] == jnp.arange(num_states)[None, None]
