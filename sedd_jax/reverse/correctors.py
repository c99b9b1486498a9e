"""Correctors: change part of the states after a step, so that they fit together better.

- Forward-backward: the forward process undoes the step, and it is taken again. If steps are exact, this does not
  change the distribution of xt (Campbell et al. 2022, section 4.4). If they are not, tokens that were drawn too early
  are drawn again (remasking, Wang et al. 2025).
- Gibbs, for graphs without a mask: at the time after the step a token is redrawn given all others. Its distribution is
  the score itself, divided by its sum, so there is no step size and no error of one.
"""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward, scores

FORWARD_BACKWARD = "forward_backward"
FORMS = (FORWARD_BACKWARD, "gibbs", "gibbs:margin:K")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gibbs:
    """Redraws tokens from score / sum of the score, some positions of a sequence for each network evaluation.

    One position at random leaves the distribution of xt as it is, if the score is exact. The positions of the least
    margin, redrawn at once, do not: they are chosen by what the tokens are, and do not see each other. That is an
    approximation which spends evaluations where the network doubts (arXiv 2605.22765).

    Attributes:
        least_margins: how many positions of the least margin are redrawn; None for one at random.
    """

    least_margins: int | None

    def redrawing(
        self, key: Key[Array, ""], draws: Any, sigma: Float[Array, "B"], is_correcting: Bool[Array, "B"]
    ) -> Any:
        """`steps.Draws` for one step, in which each evaluation of the sequences that are correcting redraws tokens.

        Args:
            key: key of the choice of positions.
            draws: the network.
            sigma: total noise of each sequence that is correcting.
            is_correcting: which sequences these are; all others take the step.
        """
        calls, rows = itertools.count(), is_correcting[:, None]

        def evaluate(xt: Int[Array, "B L"], of_step: Float[Array, "B"]) -> Any:
            return draws.evaluate_fn(xt, jnp.where(is_correcting, sigma, of_step))

        def chosen(evaluation: Any, xt: Int[Array, "B L"], is_movable: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
            own = jax.random.fold_in(key, next(calls))
            is_open = is_movable & rows
            if self.least_margins is None:
                return lowest(jax.random.uniform(own, xt.shape), is_open, 1)
            return lowest(draws.margins_fn(evaluation, xt, is_open), is_open, self.least_margins)

        def redraw(total: Float[Array, "B L"]) -> scores.Jump:
            return scores.Jump(stay=jnp.ones_like(total), slope=jnp.ones_like(total))

        def draw(key, evaluation, xt, is_movable, jump_fn):
            moves = jnp.where(rows, chosen(evaluation, xt, is_movable), is_movable)
            jump = lambda total: scores.where(is_correcting, redraw(total), jump_fn(total))
            return draws.draw_fn(key, evaluation, xt, moves, jump)

        def leap(key, rates, xt, is_movable):
            key_leap, key_redraw = jax.random.split(key)
            moved = draws.leap_fn(key_leap, rates, xt, is_movable & ~rows)
            # The first of the rates is that of the evaluation at xt.
            evaluation = rates[0].evaluation
            moves = chosen(evaluation, xt, is_movable)
            return jnp.where(rows, draws.draw_fn(key_redraw, evaluation, xt, moves, redraw), moved)

        return draws._replace(evaluate_fn=evaluate, draw_fn=draw, leap_fn=leap)


def find(spec: str) -> Gibbs | None:
    """The corrector that a spec of `FORMS` describes; None for forward-backward.

    Raises:
        ValueError: where the spec has none of these forms.
    """
    if spec == FORWARD_BACKWARD:
        return None
    found = re.fullmatch(r"gibbs(?::margin:0*([1-9][0-9]{0,8}))?", spec)
    if found is None:
        raise ValueError(f"{spec!r} is no corrector")
    return Gibbs(least_margins=None if found[1] is None else int(found[1]))


def add_noise(
    key: Key[Array, ""],
    process: forward.Process,
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> Int[Array, "B L"]:
    """The states after the forward process from time t - dt back to t (Campbell et al. 2022, section 4.4).

    Args:
        key: random key.
        process: the forward process.
        xt: states at t - dt.
        t: time of each sequence before its reverse step.
        dt: length of the reverse step.
    """
    return process.graph.sample_transition(key, xt, process.noise.sigma(t) - process.noise.sigma(t - dt))


def mask_again(
    key: Key[Array, ""], mask_id: int, xt: Int[Array, "B L"], is_filled: Bool[Array, "B L"], count: Int[Array, "B"]
) -> Int[Array, "B L"]:
    """xt with `count` of the filled positions of each sequence masked again, chosen uniformly."""
    return jnp.where(lowest(jax.random.uniform(key, xt.shape), is_filled, count[:, None]), mask_id, xt)


def lowest(
    values: Float[Array, "B L"], is_open: Bool[Array, "B L"], count: Int[Array, "B 1"] | int
) -> Bool[Array, "B L"]:
    """The `count` open positions of each sequence with the lowest values; all that are open if they are fewer."""
    place = jnp.argsort(jnp.argsort(jnp.where(is_open, values, jnp.inf), axis=1), axis=1)
    return is_open & (place < count)
