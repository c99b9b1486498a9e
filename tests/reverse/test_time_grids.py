"""Time grids: their ends and order, what each makes equal, and how given times are taken."""

import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import noise_schedules
from sedd_jax.reverse import time_grids

NOISES = {"loglinear": noise_schedules.LogLinear(), "geometric": noise_schedules.Geometric()}
GIVEN = "1,0.7,0.2,0"


def times(spec, noise, num_steps):
    """Times before each step and after the last, and that the steps add up."""
    t, dt = time_grids.find(spec)(NOISES[noise], jnp.arange(num_steps), jnp.asarray(num_steps))
    np.testing.assert_allclose(t[:-1] - dt[:-1], t[1:], atol=2e-7)
    return np.append(np.float64(t), np.float64(t[-1] - dt[-1]))


@pytest.mark.parametrize("num_steps", [1, 3, 100])
@pytest.mark.parametrize("noise", sorted(NOISES))
@pytest.mark.parametrize("spec", [*time_grids.NAMES, GIVEN])
def test_grids_go_down_from_one_to_the_end(spec, noise, num_steps):
    found = times(spec, noise, num_steps)
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[-1] == pytest.approx(time_grids.T_END, abs=2e-7)
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize("noise", sorted(NOISES))
def test_each_grid_makes_equal_what_it_says(noise):
    np.testing.assert_allclose(np.diff(times("uniform", noise, 8)), -(1 - 1e-5) / 8, rtol=1e-5)
    removed = np.diff(np.float64(NOISES[noise].sigma(jnp.asarray(times("sigma", noise, 8), jnp.float32))))
    np.testing.assert_allclose(removed, removed.mean(), rtol=1e-3)
    angles = np.arccos(times("cosine", noise, 8)[:-1])
    np.testing.assert_allclose(angles, np.arange(8) * np.pi / 16, atol=1e-3)


def test_given_times_are_taken_as_they_are_and_divided_evenly():
    np.testing.assert_allclose(times(GIVEN, "loglinear", 3), [1, 0.7, 0.2, 1e-5], atol=1e-6)
    np.testing.assert_allclose(times(GIVEN, "loglinear", 6), [1, 0.85, 0.7, 0.45, 0.2, 0.1, 1e-5], atol=1e-5)


def test_every_sequence_has_a_number_of_its_own():
    numbers, totals = jnp.array([0, 1, 5]), jnp.array([2, 4, 8])
    for spec in (*time_grids.NAMES, GIVEN):
        t, dt = time_grids.find(spec)(NOISES["loglinear"], numbers, totals)
        for row, (number, total) in enumerate(zip([0, 1, 5], [2, 4, 8], strict=True)):
            alone = times(spec, "loglinear", total)
            np.testing.assert_allclose([t[row], t[row] - dt[row]], alone[number : number + 2], atol=2e-7)


@pytest.mark.parametrize("noise", sorted(NOISES))
def test_time_is_the_inverse_of_sigma(noise):
    t = jnp.linspace(0.01, 1, 40)
    np.testing.assert_allclose(NOISES[noise].time(NOISES[noise].sigma(t)), t, rtol=1e-4)


@pytest.mark.parametrize("spec", ["even", "1", "1,1,0", "0.9,0.5,0", "1,0.5,0.4", "1,0.5,nan,0", "1,,0", ""])
def test_what_is_no_grid_is_named(spec):
    with pytest.raises(ValueError, match=rf"config\.sampling\.grid='{spec}' is no grid: name one of uniform, sigma"):
        time_grids.find(spec)
