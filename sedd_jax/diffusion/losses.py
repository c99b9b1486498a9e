"""The denoising score-entropy loss, and the bounds on likelihood that it gives (Lou et al. 2023, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, noise_schedules, scores

SummaryFn = Callable[[Int[Array, "B L"], Int[Array, "B L"], Float[Array, "B"]], scores.ScoreSummary]
T_MIN = 1e-3


class Bounds(NamedTuple):
    """Bounds on the negative log-likelihood of each sequence, in nats, from one draw of time and noise.

    Attributes:
        score_entropy: the training loss (equation 10).
        cross_entropy: the tighter bound from the same score, rescaled to the known sum of the true ratios; equal to
            `score_entropy` if the graph has no such sum.
    """

    score_entropy: Float[Array, "B"]
    cross_entropy: Float[Array, "B"]


def sample_times(key: Key[Array, ""], batch_size: int, *, t_min: float = T_MIN) -> Float[Array, "B"]:
    """Low-discrepancy times: evenly spaced over [t_min, 1], after one uniform offset (Kingma et al. 2021, appendix I).

    Each time by itself is uniform. Together they cover the interval, which lowers the variance of the batch's loss.
    """
    u = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    return t_min + (1 - t_min) * u


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
    graph: graphs.Graph = process.graph
    noise: noise_schedules.NoiseSchedule = process.noise
    sigma, dsigma_dt = noise.sigma(t), noise.dsigma_dt(t)
    summary = summary_fn(xt, x0, sigma)
    return Bounds(
        score_entropy=dsigma_dt * graph.score_entropy(summary, sigma, xt, x0).sum(-1),
        cross_entropy=dsigma_dt * graph.cross_entropy(summary, sigma, xt, x0).sum(-1),
    )


def denoising_score_entropy(
    key: Key[Array, ""], summary_fn: SummaryFn, process: forward.Process, x0: Int[Array, "B L"], t: Float[Array, "B"]
) -> Bounds:
    """The loss of each sequence (equation 10): noises x0 to time t, then compares score and true ratio.

    With t from `sample_times`, the mean over the batch estimates the integral over [t_min, 1].
    """
    xt = process.graph.sample_transition(key, x0, process.noise.sigma(t))
    return bounds(summary_fn, process, x0, xt, t)
