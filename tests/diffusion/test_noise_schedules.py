"""Schedules: the recorded values, and that the rate is the derivative of the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import noise_schedules
from tests.support import goldens

RECORDED = {
    "loglinear_eps0.001": noise_schedules.LogLinear(eps=1e-3),
    "geometric_0.001_1": noise_schedules.Geometric(sigma_min=1e-3, sigma_max=1.0),
    "geometric_0.0001_20": noise_schedules.Geometric(sigma_min=1e-4, sigma_max=20.0),
}
SCHEDULES = [noise_schedules.LogLinear(), noise_schedules.Geometric(sigma_min=1e-5), noise_schedules.Geometric()]


def quantity(noise: noise_schedules.NoiseSchedule, name: str, t: np.ndarray) -> jax.Array:
    return {"sigma": noise.sigma, "dsigma": noise.dsigma_dt}[name](jnp.asarray(t))


@goldens.cases("noise.npz")
def test_recorded(entry, golden):
    schedule, name = entry.name.removesuffix("__f64").rsplit(".", 1)
    entry.check(quantity(RECORDED[schedule], name, golden("noise.npz")["t"]))


@goldens.cases("loss.npz", r"\.d?sigma$")
def test_recorded_with_losses(entry, golden):
    name, noise, quantity_name = entry.name.split(".")
    entry.check(quantity(goldens.NOISES[noise], quantity_name, golden("loss.npz")[f"{name}.{noise}.t"]))


@pytest.mark.parametrize("noise", SCHEDULES, ids=str)
def test_rate_is_the_derivative_of_the_noise(noise):
    with jax.enable_x64(True):
        t = jnp.linspace(0.0, 1.0, 101)
        np.testing.assert_allclose(jax.vmap(jax.grad(noise.sigma))(t), noise.dsigma_dt(t), rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_log_linear_masks_in_proportion_to_time(eps):
    t = jnp.linspace(0.0, 1.0, 101)
    move_prob = -jnp.expm1(-noise_schedules.LogLinear(eps=eps).sigma(t))
    np.testing.assert_allclose(move_prob, (1 - eps) * t, rtol=2e-6)


def test_geometric_runs_from_its_least_to_its_greatest_noise():
    noise = noise_schedules.Geometric(sigma_min=1e-5, sigma_max=20.0)
    np.testing.assert_allclose(noise.sigma(jnp.array([0.0, 0.5, 1.0])), [1e-5, np.sqrt(2e-4), 20.0], rtol=1e-5)


@pytest.mark.parametrize("noise", SCHEDULES, ids=str)
def test_noise_grows_and_is_finite(noise):
    t = jnp.geomspace(1e-5, 1.0, 2001)
    sigma, rate = noise.sigma(t), noise.dsigma_dt(t)
    for quantity in (sigma, rate):
        assert jnp.isfinite(quantity).all()
        assert (quantity > 0).all()
    assert (jnp.diff(sigma) > 0).all()
