"""The distributions of times in training. A loss divides them out, so its expectation is the same for all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sedd_jax.diffusion import pairs

T_MIN = 1e-3
# Standard deviation of the bell of times, in units of the interval; at its ends the density is 0.33 of the even one.
_BELL_WIDTH = 0.3
# The learned law: intervals of time with a moment each, the decay of moments in a step, and the share of even times.
NUM_INTERVALS = 32
_DECAY, _EVEN_SHARE = 0.99, 0.1


class Times(NamedTuple):
    """Times of a batch, drawn from one of `time_laws`.

    Attributes:
        t: time of each sequence.
        weights: density of even times over the density that t is drawn from. So the mean of weights x loss has the
            same expectation for all of them.
    """

    t: Float[Array, "B"]
    weights: Float[Array, "B"]


class Moments(NamedTuple):
    """What training remembers of the losses of single sequences, for K equal intervals of [t_min, 1].

    Attributes:
        squares: sum of the squared losses in each interval. Older steps count less.
        counts: number of losses in each interval, discounted likewise.
    """

    squares: Float[Array, "K"]
    counts: Float[Array, "K"]


def time_laws() -> dict[str, str]:
    """The distributions from which training may draw times, and what each is."""
    return {
        "uniform": "evenly, as published",
        "bell": "more in the middle: a normal distribution, cut off at the ends",
        "learned": "in proportion to the root mean square of the loss at each time, measured as training goes on",
    }


def no_moments() -> Moments:
    """Moments before the first step: the learned law is even."""
    return Moments(jnp.zeros(NUM_INTERVALS), jnp.zeros(NUM_INTERVALS))


def add_losses(moments: Moments, t: Float[Array, "B"], losses: Float[Array, "B"], t_min: float = T_MIN) -> Moments:
    """Moments after a step that found these losses of sequences at times t."""
    place = (t - t_min) / (1 - t_min) * NUM_INTERVALS
    # A product, not a scatter, whose order of additions differs from run to run on GPUs.
    is_in = jax.nn.one_hot(jnp.clip(place.astype(jnp.int32), 0, NUM_INTERVALS - 1), NUM_INTERVALS)
    return Moments(
        squares=_DECAY * moments.squares + (is_in * jnp.square(losses)[:, None]).sum(0),
        counts=_DECAY * moments.counts + is_in.sum(0),
    )


def density(moments: Moments, *, symmetric: bool = False) -> Float[Array, "K"]:
    """The learned law: its density in each interval, in units of the even one.

    It is proportional to the root mean square of the loss, which gives the mean of weights x loss the least variance.
    A tenth of it is even, so no weight exceeds 10.

    Args:
        moments: what training remembers.
        symmetric: whether times as far from the one end as from the other are equally likely, as pairs need it.
    """
    mean = moments.squares.sum() / jnp.maximum(moments.counts.sum(), 1.0)
    # One more loss of the mean size in each interval: what has hardly been seen counts as usual.
    found = jnp.sqrt((moments.squares + mean) / (moments.counts + 1.0))
    found = found + found[::-1] if symmetric else found
    found = jnp.where(mean > 0, found, 1.0)
    return (1 - _EVEN_SHARE) * found / found.mean() + _EVEN_SHARE


def sample_times(
    key: Key[Array, ""],
    batch_size: int,
    law: str = "uniform",
    *,
    moments: Moments | None = None,
    paired: bool = False,
    t_min: float = T_MIN,
) -> Times:
    """Low-discrepancy times over [t_min, 1], which together cover the interval.

    Numbers evenly spaced over [0, 1] after one uniform offset (Kingma et al. 2021, appendix I) are mapped to times by
    the law's quantiles. Each time by itself follows the law. Together they lower the variance of the batch's loss.

    Args:
        key: key of the offset.
        batch_size: number of times.
        law: one of `time_laws`.
        moments: losses of earlier steps; the law "learned" needs them.
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
    elif law == "learned":
        assert moments is not None
        u, weights = _quantiles(density(moments, symmetric=paired), u)
    return Times(t=t_min + (1 - t_min) * u, weights=weights)


def _quantiles(found: Float[Array, "K"], u: Float[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Places in [0, 1] with a share u of the law below them, and 1 / density there."""
    ends = jnp.cumsum(found) / found.sum()
    interval = jnp.minimum(jnp.searchsorted(ends, u, side="right"), NUM_INTERVALS - 1)
    below = jnp.where(interval > 0, ends[interval - 1], 0.0)
    within = jnp.clip((u - below) / (ends[interval] - below), 0.0, 1.0)
    return (interval + within) / NUM_INTERVALS, 1 / found[interval]
