"""The theta-trapezoidal sampler (Ren et al. 2025, arXiv 2502.00234): two evaluations a step, errors of second order.

Theta is 1/2, where the rates have the least to extrapolate. Rates below 0 count as 0: where tokens depend on each other
so strongly that there are such, the order is lost, though little of the gain (docs/log.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward, steps


def step(
    key: Key[Array, ""],
    draws: steps.Draws,
    process: forward.Process,
    given: steps.Given,
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> Int[Array, "B L"]:
    """A `steps.StepFn`: two leaps of half the step each, in the noise's own time (`graphs.Graph.leap_time`).

    The first leap takes the rates mu of the start. The second starts from where the first led to and takes the rates
    2 mu* - mu, where mu* are those of the middle.
    """
    graph, noise = process.graph, process.noise
    key_first, key_second = jax.random.split(key)
    sigma = noise.sigma(t)
    half = (graph.leap_time(sigma) - graph.leap_time(noise.sigma(t - dt))) / 2
    middle = graph.sigma_at(graph.leap_time(sigma) - half)

    def rates(xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> steps.Rates:
        return steps.Rates(draws.evaluate_fn(xt, sigma), half[:, None] * graph.leap_rate(xt, sigma))

    first = rates(xt, sigma)
    between = draws.leap_fn(key_first, [first], xt, graph.is_noise(xt) & ~given.is_given)
    second = rates(between, middle)
    # A position that has jumped has nothing to extrapolate from.
    back = first._replace(slope=jnp.where(between == xt, -first.slope, 0.0))
    terms = [second._replace(slope=2 * second.slope), back]
    return draws.leap_fn(key_second, terms, between, graph.is_noise(between) & ~given.is_given)
