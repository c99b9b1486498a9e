"""The bound of a sampler that takes few steps: what each costs in likelihood (Sohl-Dickstein et al. 2015, equation 14).

A sampler with steps between times t_0 > t_1 > ... bounds -log p(x0) by a sum over them of the KL divergences of
q(xs | xt, x0), which knows x0, from the law of the step. A longer step costs more, since it moves positions that do not
know of each other; the sum of a finer grid is smaller. Each term depends on its two times alone.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sedd_jax.diffusion import graphs


def absorbing(
    graph: graphs.Absorbing,
    summary: graphs.ScoreSummary,
    sigma: Float[Array, "B"],
    after: Float[Array, "B"],
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
) -> Float[Array, "B L"]:
    """The term of a step that leaves masks as surely as it should, to tokens in proportion to the score, in nats.

    Args:
        graph: the forward process.
        summary: of the score at xt.
        sigma: total noise of xt.
        after: total noise after the step.
        xt: noised tokens.
        x0: clean tokens.
    """
    leaves = jnp.exp(-after) * jnp.expm1(after - sigma) / jnp.expm1(-sigma)
    return leaves[:, None] * graph.reconstruction(summary, sigma, xt, x0)


def uniform(
    graph: graphs.Uniform,
    summary: graphs.ScoreSummary,
    sigma: Float[Array, "B"],
    after: Float[Array, "B"],
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
) -> Float[Array, "B L"]:
    """The term of a step that keeps its rates: stays with probability exp(-their sum), else jumps in proportion.

    Args are those of `absorbing`.
    """
    n = graph.num_states
    moved = lambda noise: -jnp.expm1(-noise)[:, None]  # The probability of a redraw from all n.
    step, start = moved(sigma - after), moved(after)
    other, same = lambda p: p / n, lambda p: 1 - p + p / n
    is_same = xt == x0
    # q at xt, at x0 where that is another, and at each of the rest: proportional to p(xt | y) p(y | x0).
    evidence = jnp.where(is_same, same(moved(sigma)), other(moved(sigma)))
    at_xt = same(step) * jnp.where(is_same, same(start), other(start)) / evidence
    at_x0 = jnp.where(is_same, 0.0, other(step) * same(start) / evidence)
    at_rest, num_rest = other(step) * other(start) / evidence, n - 2 + is_same
    total = jnp.exp(summary.logsumexp)
    jumps = graph.reverse_rate(xt) * (sigma - after)[:, None] * total
    log_share = jnp.log(-jnp.expm1(-jumps)) - summary.logsumexp
    of_rest = summary.mean * n - summary.at_x0  # which is 0 at xt
    return (
        _entropy_term(at_xt)
        + at_xt * jumps
        + _entropy_term(at_x0)
        - at_x0 * (log_share + summary.at_x0)
        + num_rest * _entropy_term(at_rest)
        - at_rest * (num_rest * log_share + of_rest)
    )


def _entropy_term(p: Float[Array, "B L"]) -> Float[Array, "B L"]:
    return p * jnp.log(jnp.where(p > 0, p, 1.0))


BOUNDS: dict[type, Callable[..., Float[Array, "B L"]]] = {graphs.Absorbing: absorbing, graphs.Uniform: uniform}
