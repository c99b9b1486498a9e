"""Time grids: the times of a sampler's steps, from t = 1 to T_END; by default evenly spaced.

A grid is named, or given as a list of times from 1 down to 0. Times between the given ones are interpolated linearly.
With `num_steps + 1` times, each is used as given.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.diffusion import noise_schedules

T_END = 1e-5
# (schedule, number of each sequence's step from 0, its number of steps) -> (time before the step, length of the step).
GridFn = Callable[
    [noise_schedules.NoiseSchedule, Int[Array, "B"], Int[Array, "*B"]], tuple[Float[Array, "B"], Float[Array, "B"]]
]
# (schedule, share of steps taken) -> time.
TimeFn = Callable[[noise_schedules.NoiseSchedule, Float[Array, "B"]], Float[Array, "B"]]


def uniform(
    noise: noise_schedules.NoiseSchedule, i: Int[Array, "B"], num_steps: Int[Array, "*B"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Steps of equal length in t, as published."""
    del noise
    dt = jnp.broadcast_to((1 - T_END) / num_steps.astype(jnp.float32), i.shape)
    return 1 - i * dt, dt


def sigma(noise: noise_schedules.NoiseSchedule, share: Float[Array, "B"]) -> Float[Array, "B"]:
    """Times of steps that each remove the same noise."""
    start, end = noise.sigma(jnp.float32(1.0)), noise.sigma(jnp.float32(T_END))
    return noise.time(start + (end - start) * share)


def cosine(noise: noise_schedules.NoiseSchedule, share: Float[Array, "B"]) -> Float[Array, "B"]:
    """Times of steps that are short at first, when few tokens are known (Chang et al. 2022, Shi et al. 2024)."""
    del noise
    return jnp.cos(math.pi / 2 * share)


NAMES = ("uniform", "sigma", "cosine")


def find(spec: str) -> GridFn:
    """The grid that a spec describes: one of `NAMES`, or times such as "1,0.8,0.3,0".

    Raises:
        ValueError: where the spec is neither.
    """
    if spec == "uniform":
        return uniform
    return _by_share({"sigma": sigma, "cosine": cosine}.get(spec) or _through(parse(spec)))


def times(spec: str, noise: noise_schedules.NoiseSchedule, num_steps: int) -> Float[np.ndarray, "n"]:
    """The n = num_steps + 1 times of a grid: the time before each step, and T_END."""
    t, _ = find(spec)(noise, jnp.arange(num_steps), jnp.asarray(num_steps))
    return np.append(np.float64(t), T_END)


def parse(spec: str) -> Float[np.ndarray, "n"]:
    """The times of a grid that is given as a list of times, from 1 down to T_END or below.

    Raises:
        ValueError: where `spec` is not such a list.
    """
    try:
        times = np.array([float(part) for part in spec.split(",")])
    except ValueError:
        times = np.zeros(0)
    if len(times) < 2 or times[0] != 1 or not 0 <= times[-1] <= T_END or not (np.diff(times) < 0).all():
        raise ValueError(
            f"config.sampling.grid={spec!r} is no grid: name one of {', '.join(NAMES)}, or give times that go down "
            "from 1 to 0, such as 1,0.8,0.3,0"
        )
    return times


def _by_share(time_fn: TimeFn) -> GridFn:
    def grid(noise, i, num_steps):
        # Rounding must not lead below T_END.
        time = lambda i: jnp.maximum(time_fn(noise, i / num_steps), T_END)
        t = time(i)
        return t, t - time(i + 1)

    return grid


def _through(times: Float[np.ndarray, "n"]) -> TimeFn:
    shares = np.linspace(0, 1, len(times))
    return lambda noise, share: jnp.interp(share, jnp.asarray(shares), jnp.asarray(times))
