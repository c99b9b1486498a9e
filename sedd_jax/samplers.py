"""Samplers: the reverse process in steps of dt, every position at once (Lou et al. 2023, section 4).

A step is a `graphs.Jump`: how likely each position stays, and how its other weights follow from the score. Who holds
the score draws from it (`MoveFn`), so that no sampler needs the score of every token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax import graphs, noise_schedules

# The sum of the score over all y != xt -> the law of the step.
JumpFn = Callable[[Float[Array, "B L"]], graphs.Jump]
# (key, xt, sigma, positions that may move, law of the step) -> xt after it.
MoveFn = Callable[[Key[Array, ""], Int[Array, "B L"], Float[Array, "B"], Bool[Array, "B L"], JumpFn], Int[Array, "B L"]]
T_END = 1e-5


class Given(NamedTuple):
    """Tokens that are known beforehand: a prompt, or the text around gaps (equation 21).

    Attributes:
        tokens: the known tokens; anything where unknown.
        is_given: where `tokens` counts.
    """

    tokens: Int[Array, "B L"]
    is_given: Bool[Array, "B L"]

    def clamp(self, xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        """Writes the known tokens over xt."""
        return jnp.where(self.is_given, self.tokens, xt)


def nothing_given(shape: tuple[int, int]) -> Given:
    """No token is known: plain generation of a [B, L] batch."""
    return Given(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def euler(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> graphs.Jump:
    """An Euler step (equation 17): delta(xt, y) + dt dsigma_dt Q(xt, y) score_y.

    At y = xt the rates count minus their sum, which makes that weight negative where dt is too large for them.

    Args:
        graph: the forward process.
        noise: the schedule.
        total: sum of the score over all y != xt.
        xt: current states.
        t: time of each sequence.
        dt: length of the step.
    """
    rate = graph.reverse_rate(xt) * (dt * noise.dsigma_dt(t))[:, None]
    return graphs.Jump(stay=1 - rate * total, slope=rate)


def tau_leaping(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> graphs.Jump:
    """A tau-leap: rates frozen over the step, stay with probability exp(-dt total rate), else jump in proportion.

    (Campbell et al. 2022, section 4.3, with at most one jump a position, since a token is not a number to add to.)
    Args are those of `euler`.
    """
    rate = graph.reverse_rate(xt) * (dt * noise.dsigma_dt(t))[:, None]
    jumps = rate * total
    share = jnp.where(jumps > 0, -jnp.expm1(-jumps) / jnp.where(jumps > 0, total, 1.0), 0.0)
    return graphs.Jump(stay=jnp.exp(-jumps), slope=share)


def tweedie(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> graphs.Jump:
    """A Tweedie step (equations 19, 20): the best that moves positions independently (theorem 4.2).

    Args are those of `euler`.
    """
    return graph.tweedie_jump(total, xt, noise.sigma(t) - noise.sigma(t - dt))


SAMPLERS = {"euler": euler, "tau_leaping": tau_leaping, "tweedie": tweedie}


def reverse_steps(
    key: Key[Array, ""],
    move_fn: MoveFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    num_steps: Int[Array, ""] | int,
    *,
    sampler: str,
) -> Int[Array, "B L"]:
    """Takes the reverse steps `start` to `stop` of `num_steps`, from t = 1 (step 0) toward T_END.

    Each step's key is folded from its number, so any split into calls gives the same tokens, and the numbers may be
    traced: one compilation serves every number of steps.

    Args:
        key: base key of the whole trajectory.
        move_fn: draws the next states from the network's score and the law of the step.
        graph: the forward process.
        noise: the schedule.
        given: known tokens, clamped before every evaluation.
        xt: state before step `start`.
        start: first step to take.
        stop: step to stop before.
        num_steps: steps of the whole trajectory, evenly spaced in t.
        sampler: a name in `SAMPLERS`.
    """
    jump = SAMPLERS[sampler]
    dt = (1 - T_END) / jnp.asarray(num_steps, jnp.float32)

    def step(i: Int[Array, ""], xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        xt = given.clamp(xt)
        t = jnp.full(xt.shape[0], 1 - i * dt)
        is_movable = graph.is_noise(xt) & ~given.is_given
        law = lambda total: jump(graph, noise, total, xt, t, dt)
        return move_fn(jax.random.fold_in(key, i), xt, noise.sigma(t), is_movable, law)

    return jax.lax.fori_loop(start, stop, step, xt)


def denoise(
    key: Key[Array, ""],
    move_fn: MoveFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
) -> Int[Array, "B L"]:
    """The last step, from t = T_END to clean tokens, no mask among them (theorem 4.1)."""
    xt = given.clamp(xt)
    sigma = jnp.full(xt.shape[0], noise.sigma(jnp.float32(T_END)))
    is_movable = graph.is_noise(xt) & ~given.is_given
    return move_fn(key, xt, sigma, is_movable, lambda total: graph.denoise_jump(total, xt, sigma))


def sample(
    key: Key[Array, ""],
    move_fn: MoveFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    num_steps: Int[Array, ""] | int,
    *,
    sampler: str,
) -> Int[Array, "B L"]:
    """Draws clean sequences: the limit distribution, `num_steps` reverse steps, `denoise`; nfe = num_steps + 1.

    Args are those of `reverse_steps`.
    """
    key_limit, key_steps, key_denoise = jax.random.split(key, 3)
    xt = graph.sample_limit(key_limit, given.tokens.shape)
    xt = reverse_steps(key_steps, move_fn, graph, noise, given, xt, 0, num_steps, num_steps, sampler=sampler)
    return denoise(key_denoise, move_fn, graph, noise, given, xt)
