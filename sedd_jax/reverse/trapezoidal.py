"""The theta-trapezoidal sampler (Ren et al. 2025, arXiv 2502.00234): second order, with two evaluations per step.

Theta is 1/2, where rates are extrapolated the least. Extrapolated rates below 0 count as 0. They occur if tokens depend
strongly on each other; then the second order is lost, but little of the gain (docs/log.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward
from sedd_jax.reverse import steps


def step(
    key: Key[Array, ""],
    draws: steps.Draws,
    process: forward.Process,
    given: steps.Given,
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> Int[Array, "B L"]:
    """xt one step later (a `steps.StepFn`), by two leaps of half the step each on the scale `graphs.Graph.leap_time`.

    The first leap uses the rates mu at the start. The second leap begins where the first one ended, and uses the rates
    2 mu* - mu, where mu* are the rates there, at the middle of the step.
    """
    graph, noise = process.graph, process.noise
    key_first, key_second = jax.random.split(key)
    sigma = noise.sigma(t)
    half = (graph.leap_time(sigma) - graph.leap_time(noise.sigma(t - dt))) / 2
    middle = graph.sigma_at(graph.leap_time(sigma) - half)

    def rates(xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> steps.Rates:
        return steps.Rates(draws.evaluate_fn(xt, sigma), half[:, None] * graph.leap_rate(xt, sigma))

    first = rates(xt, sigma)
    between = draws.leap_fn(key_first, [first], xt, given.is_movable(graph, xt))
    second = rates(between, middle)
    # A position that has jumped in the first leap has no rates to extrapolate from.
    back = first._replace(slope=jnp.where(between == xt, -first.slope, 0.0))
    terms = [second._replace(slope=2 * second.slope), back]
    return draws.leap_fn(key_second, terms, between, given.is_movable(graph, between))
