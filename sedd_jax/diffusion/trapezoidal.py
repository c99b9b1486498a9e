"""The theta-trapezoidal sampler (Ren et al. 2025, arXiv 2502.00234): two evaluations a step, errors of second order.

A step of length h, in the noise's own time (`graphs.*.leap_time`), leaps over its first half with the rates mu of its
start; then, from where that led to, over the second half with the rates 2 mu* - mu, where mu* are those of the middle.
Theta is 1/2, where the rates have the least to extrapolate. Rates below 0 count as 0: where tokens depend on each other
so strongly that there are such, the order is lost, though little of the gain (docs/log.md).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs, noise_schedules, samplers

NAME = "theta_trapezoidal"


class Evaluation(NamedTuple):
    """The score at a state, times a factor at each position: rates of jumps to every other token.

    Attributes:
        features: what the network made of it.
        sigma: the noise that it was told.
        slope: factor of the score.
    """

    features: Any
    sigma: Float[Array, "B"]
    slope: Float[Array, "B L"]


# (xt, sigma) -> what the network makes of them.
EvaluateFn = Callable[[Int[Array, "B L"], Float[Array, "B"]], Any]
# (key, rates that add up, xt, positions that may move) -> xt after a leap with them, those below 0 taken as 0.
LeapFn = Callable[[Key[Array, ""], list[Evaluation], Int[Array, "B L"], Bool[Array, "B L"]], Int[Array, "B L"]]


def predictor(
    evaluate_fn: EvaluateFn,
    leap_fn: LeapFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: samplers.Given,
) -> samplers.PredictFn:
    """A step of two evaluations.

    Args:
        evaluate_fn: the network.
        leap_fn: draws from its scores.
        graph: the forward process.
        noise: the schedule.
        given: known tokens, which do not move.
    """

    def predict(
        key: Key[Array, ""], xt: Int[Array, "B L"], t: Float[Array, "B"], dt: Float[Array, "B"]
    ) -> Int[Array, "B L"]:
        key_first, key_second = jax.random.split(key)
        sigma = noise.sigma(t)
        half = (graph.leap_time(sigma) - graph.leap_time(noise.sigma(t - dt))) / 2
        middle = graph.sigma_at(graph.leap_time(sigma) - half)

        def rates(xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Evaluation:
            return Evaluation(evaluate_fn(xt, sigma), sigma, half[:, None] * graph.leap_rate(xt, sigma))

        first = rates(xt, sigma)
        between = leap_fn(key_first, [first], xt, graph.is_noise(xt) & ~given.is_given)
        second = rates(between, middle)
        # A position that has jumped has nothing to extrapolate from.
        back = first._replace(slope=jnp.where(between == xt, -first.slope, 0.0))
        terms = [second._replace(slope=2 * second.slope), back]
        return leap_fn(key_second, terms, between, graph.is_noise(between) & ~given.is_given)

    return predict
