"""Floating-point operations of a step, against sums written out."""

import jax.numpy as jnp
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks, score_losses, work

LENGTH = 1024
BLOCKS, ATTENTION, HEAD = 12 * 12 * 768**2, 12 * 768 * LENGTH, 768 * 50258


def process(graph="absorb", noise="loglinear", **settings):
    return forward.Process(
        graphs.GRAPHS[graph].from_tokenizer(50257 + (graph == "uniform"), None),
        noise_schedules.SCHEDULES[noise](**settings or {"eps": 1e-3}),
    )


def network(**settings):
    return networks.NetworkConfig(num_states=50258, **settings)


@pytest.mark.parametrize(
    ("process", "settings", "share"),
    [
        (process(), {}, (1 - 1e-3) * (1 + 1e-3) / 2),
        (process("uniform"), {"scale_by_sigma": False}, 1.0),
        (process(), {"causal": True}, 1.0),
    ],
    ids=["masks", "uniform", "baseline"],
)
def test_needed_work_of_the_published_small_network(process, settings, share):
    found = work.of_training(network(**settings), work.head_share(network(**settings), process), 8, LENGTH)
    assert found.needed == pytest.approx(6 * (BLOCKS + share * HEAD) + 12 * ATTENTION, rel=1e-6)


def test_masks_are_counted_under_every_schedule():
    """sigma = 1e-3^(1-t) 20^t: the share of masks is the mean of 1 - e^-sigma over t in [1e-3, 1]."""
    t = jnp.linspace(1e-3, 1, 100_001)
    expected = 1 - jnp.exp(-(1e-3 ** (1 - t)) * 20.0**t).mean()
    found = work.head_share(network(), process(noise="geometric", sigma_min=1e-3, sigma_max=20.0))
    assert found == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("remat", ["none", "elementwise", "blocks"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_repeated_work(monkeypatch, remat, one_pass):
    monkeypatch.setattr(score_losses, "fits", lambda *_: one_pass)
    found = work.of_training(network(remat=remat), 1.0, 8, LENGTH)
    expected = 2 * ATTENTION + (2 * BLOCKS + 4 * ATTENTION) * (remat == "blocks") + 2 * HEAD * (not one_pass)
    assert found.repeated == pytest.approx(expected)


def test_an_evaluation_repeats_nothing():
    found = work.of_evaluation(network(), LENGTH, 0.25)
    assert found == pytest.approx((2 * BLOCKS + 4 * ATTENTION + 0.25 * 2 * HEAD, 0))
