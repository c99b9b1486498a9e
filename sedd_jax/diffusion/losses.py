"""The denoising score-entropy loss, and the bounds on likelihood that it gives (Lou et al. 2023, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, noise_schedules, pairs, scores

SummaryFn = Callable[[Int[Array, "B L"], Int[Array, "B L"], Float[Array, "B"]], scores.ScoreSummary]
T_MIN = 1e-3
# Standard deviation of the bell of times, in units of the interval; at its ends the density is 0.33 of the even one.
_BELL_WIDTH = 0.3


class Bounds(NamedTuple):
    """Bounds on the negative log-likelihood of each sequence, in nats, from one draw of time and noise.

    Attributes:
        score_entropy: the training loss (equation 10).
        cross_entropy: the tighter bound from the same score, rescaled to the known sum of the true ratios; equal to
            `score_entropy` if the graph has no such sum.
    """

    score_entropy: Float[Array, "B"]
    cross_entropy: Float[Array, "B"]


class Noised(NamedTuple):
    """Noised sequences, as a loss hands them to the network.

    Attributes:
        xt: noised tokens.
        x0: clean tokens.
        sigma: total noise of each sequence.
        weights: factor of each sequence's score entropy in the loss of the batch.
    """

    xt: Int[Array, "B L"]
    x0: Int[Array, "B L"]
    sigma: Float[Array, "B"]
    weights: Float[Array, "B"]


class Times(NamedTuple):
    """Times of a batch, drawn from one of `time_laws`.

    Attributes:
        t: time of each sequence.
        weights: density of even times over the density that t is drawn from. So the mean of weights x loss has the
            same expectation for all of them.
    """

    t: Float[Array, "B"]
    weights: Float[Array, "B"]


def time_laws() -> dict[str, str]:
    """The distributions from which training may draw times, and what each is."""
    return {
        "uniform": "evenly, as published",
        "bell": "more in the middle: a normal distribution, cut off at the ends",
    }


def sample_times(
    key: Key[Array, ""], batch_size: int, law: str = "uniform", *, paired: bool = False, t_min: float = T_MIN
) -> Times:
    """Low-discrepancy times over [t_min, 1], which together cover the interval.

    Numbers evenly spaced over [0, 1] after one uniform offset (Kingma et al. 2021, appendix I) are mapped to times by
    the law's quantiles. Each time by itself follows the law. Together they lower the variance of the batch's loss.

    Args:
        key: key of the offset.
        batch_size: number of times.
        law: one of `time_laws`.
        paired: whether sequences 2i and 2i + 1 have opposite times, as far from the one end as from the other.
        t_min: least time.
    """
    count = batch_size // 2 if paired else batch_size
    u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    u = pairs.opposite(u) if paired else u
    weights = jnp.ones_like(u)
    if law == "bell":
        below = jax.scipy.stats.norm.cdf(-0.5 / _BELL_WIDTH)
        z = jax.scipy.special.ndtri(below + (1 - 2 * below) * u)
        u = 0.5 + _BELL_WIDTH * z
        weights = _BELL_WIDTH * (1 - 2 * below) / jax.scipy.stats.norm.pdf(z)
    return Times(t=t_min + (1 - t_min) * u, weights=weights)


def bounds(
    summary_fn: SummaryFn, process: forward.Process, x0: Int[Array, "B L"], xt: Int[Array, "B L"], t: Float[Array, "B"]
) -> Bounds:
    """Both bounds of each sequence, at given times and noised tokens.

    Args:
        summary_fn: (xt, x0, sigma) -> the network's `scores.ScoreSummary`.
        process: the forward process.
        x0: clean tokens.
        xt: noised tokens.
        t: time of each sequence.
    """
    noise: noise_schedules.NoiseSchedule = process.noise
    sigma, dsigma_dt = noise.sigma(t), noise.dsigma_dt(t)
    found = of_positions(process.graph, summary_fn(xt, x0, sigma), sigma, xt, x0)
    return Bounds(*(dsigma_dt * x.sum(-1) for x in found))


def of_positions(
    graph: graphs.Graph,
    summary: scores.ScoreSummary,
    sigma: Float[Array, "B"],
    xt: Int[Array, "B L"],
    x0: Int[Array, "B L"],
) -> Bounds:
    """Both bounds of every position [B, L], for dsigma/dt = 1."""
    return Bounds(
        score_entropy=graph.score_entropy(summary, sigma, xt, x0),
        cross_entropy=graph.cross_entropy(summary, sigma, xt, x0),
    )


def denoising_score_entropy(
    key: Key[Array, ""], summary_fn: SummaryFn, process: forward.Process, x0: Int[Array, "B L"], t: Float[Array, "B"]
) -> Bounds:
    """The loss of each sequence (equation 10): noises x0 to time t, then compares score and true ratio.

    With even times (`sample_times`), the mean over the batch estimates the integral over [t_min, 1].
    """
    xt = process.graph.sample_transition(key, x0, process.noise.sigma(t))
    return bounds(summary_fn, process, x0, xt, t)


def noised(
    key: Key[Array, ""], process: forward.Process, x0: Int[Array, "B L"], times: Times, *, paired: bool = False
) -> Noised:
    """Noises x0. The loss with these weights is the mean over the batch (equation 10).

    Args:
        key: key of the noise.
        process: the forward process.
        x0: clean tokens.
        times: time of each sequence.
        paired: whether sequences 2i and 2i + 1 get opposite noise.
    """
    noise: noise_schedules.NoiseSchedule = process.noise
    sigma = noise.sigma(times.t)
    xt = process.graph.sample_transition(key, x0, sigma, paired=paired)
    return Noised(xt=xt, x0=x0, sigma=sigma, weights=times.weights * noise.dsigma_dt(times.t) / len(x0))
