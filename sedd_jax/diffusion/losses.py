"""The denoising score-entropy loss, and the bounds on likelihood that it gives (Lou et al. 2023, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, noise_schedules, scores, time_laws

SummaryFn = Callable[[Int[Array, "B L"], Int[Array, "B L"], Float[Array, "B"]], scores.ScoreSummary]


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

    With even times (`time_laws.sample_times`), the mean over the batch estimates the integral over [t_min, 1].
    """
    xt = process.graph.sample_transition(key, x0, process.noise.sigma(t))
    return bounds(summary_fn, process, x0, xt, t)


def noised(
    key: Key[Array, ""],
    process: forward.Process,
    x0: Int[Array, "B L"],
    times: time_laws.Times,
    *,
    paired: bool = False,
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
