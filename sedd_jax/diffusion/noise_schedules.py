"""Noise schedules: the total noise sigma(t) of a token at time t (Lou et al. 2023, sections 3.3 and 5.1)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear:
    """sigma(t) = -log(1 - (1 - eps) t). With `graphs.Absorbing`, a token is masked with probability (1 - eps) t.

    Attributes:
        eps: share of tokens that are still unmasked at t = 1.
    """

    eps: float = 1e-3

    def sigma(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Total noise, the integral of the rate from 0 to t."""
        return -jnp.log1p(-(1 - self.eps) * t)

    def dsigma_dt(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Rate of noise at t."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time at which the total noise is sigma."""
        return -jnp.expm1(-sigma) / (1 - self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometric:
    """sigma(t) = sigma_min^(1-t) sigma_max^t.

    Attributes:
        sigma_min: total noise at t = 0; the paper uses 1e-5, the published configuration 1e-4.
        sigma_max: total noise at t = 1.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def sigma(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Total noise, the integral of the rate from 0 to t, plus sigma_min."""
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def dsigma_dt(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Rate of noise at t: sigma(t) log(sigma_max / sigma_min)."""
        return self.sigma(t) * jnp.log(jnp.float32(self.sigma_max) / jnp.float32(self.sigma_min))

    def time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time at which the total noise is sigma."""
        return jnp.log(sigma / self.sigma_min) / jnp.log(jnp.float32(self.sigma_max) / jnp.float32(self.sigma_min))


NoiseSchedule = LogLinear | Geometric
SCHEDULES = {"loglinear": LogLinear, "geometric": Geometric}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise schedule.

    Attributes:
        name: noise schedule: loglinear or geometric.
        eps: for loglinear: share of tokens that are still unmasked at t = 1.
        sigma_min: for geometric: total noise sigma at t = 0.
        sigma_max: for geometric: total noise sigma at t = 1.
    """

    name: str = "loglinear"
    eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
