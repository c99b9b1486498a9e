"""Samplers: the reverse process in steps of dt, every position at once (Lou et al. 2023, section 4).

A step turns the score at (xt, t) into weights over the next state of every position; `sample` draws from them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax import categoricals, graphs, noise_schedules

ScoreFn = Callable[[Int[Array, "B L"], Float[Array, "B"]], Float[Array, "B L V"]]
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
    score: Float[Array, "B L V"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> Float[Array, "B L V"]:
    """Weights of an Euler step at each position (equation 17): delta(xt, y) + dt dsigma_dt Q(xt, y) score_y.

    At y = xt the rates count minus their sum, which makes that weight negative where dt is too large for them.
    """
    rates = graphs.reverse_rate(graph, score, xt) * (dt * noise.dsigma_dt(t))[:, None, None]
    return jax.nn.one_hot(xt, graph.num_states) + rates


def tau_leaping(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    score: Float[Array, "B L V"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> Float[Array, "B L V"]:
    """Weights of a tau-leap: rates frozen over the step, stay with probability exp(-dt total), else jump in proportion.

    (Campbell et al. 2022, section 4.3, with at most one jump a position, since a token is not a number to add to.)
    """
    rates = graphs.reverse_rate(graph, score, xt) * (dt * noise.dsigma_dt(t))[:, None, None]
    current = xt[..., None] == jnp.arange(graph.num_states)[None, None]
    jumps = jnp.where(current, 0.0, rates)
    total = jumps.sum(-1, keepdims=True)
    share = jumps / jnp.where(total > 0, total, 1.0)
    return jnp.where(current, jnp.exp(-total), -jnp.expm1(-total) * share)


def tweedie(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    score: Float[Array, "B L V"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, ""],
) -> Float[Array, "B L V"]:
    """Weights of a Tweedie step (equations 19, 20): the best that moves positions independently (theorem 4.2)."""
    return graph.tweedie_weights(score, xt, noise.sigma(t) - noise.sigma(t - dt))


SAMPLERS = {"euler": euler, "tau_leaping": tau_leaping, "tweedie": tweedie}


def reverse_steps(
    key: Key[Array, ""],
    score_fn: ScoreFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    num_steps: Int[Array, ""] | int,
    *,
    sampler: str,
    draw: categoricals.Draw = categoricals.draw,
) -> Int[Array, "B L"]:
    """Takes the reverse steps `start` to `stop` of `num_steps`, from t = 1 (step 0) toward T_END.

    Each step's key is folded from its number, so any split into calls gives the same tokens, and the numbers may be
    traced: one compilation serves every number of steps.

    Args:
        key: base key of the whole trajectory.
        score_fn: (xt, sigma) -> score, exp of the network's log score.
        graph: the forward process.
        noise: the schedule.
        given: known tokens, clamped before every evaluation.
        xt: state before step `start`.
        start: first step to take.
        stop: step to stop before.
        num_steps: steps of the whole trajectory, evenly spaced in t.
        sampler: a name in `SAMPLERS`.
        draw: how to draw from weights, `categoricals.draw` unless imitating the published program.
    """
    step_weights = SAMPLERS[sampler]
    dt = (1 - T_END) / jnp.asarray(num_steps, jnp.float32)

    def step(i: Int[Array, ""], xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        xt = given.clamp(xt)
        t = jnp.full(xt.shape[0], 1 - i * dt)
        weights = step_weights(graph, noise, score_fn(xt, noise.sigma(t)), xt, t, dt)
        return draw(jax.random.fold_in(key, i), weights)

    return jax.lax.fori_loop(start, stop, step, xt)


def denoise(
    key: Key[Array, ""],
    score_fn: ScoreFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
    *,
    draw: categoricals.Draw = categoricals.draw,
) -> Int[Array, "B L"]:
    """The last step, from t = T_END to clean tokens, no mask among them (theorem 4.1)."""
    xt = given.clamp(xt)
    sigma = jnp.full(xt.shape[0], noise.sigma(jnp.float32(T_END)))
    return given.clamp(draw(key, graph.denoise_weights(score_fn(xt, sigma), xt, sigma)))


def sample(
    key: Key[Array, ""],
    score_fn: ScoreFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    num_steps: Int[Array, ""] | int,
    *,
    sampler: str,
    draw: categoricals.Draw = categoricals.draw,
) -> Int[Array, "B L"]:
    """Draws clean sequences: the limit distribution, `num_steps` reverse steps, `denoise`; nfe = num_steps + 1.

    Args are those of `reverse_steps`.
    """
    key_limit, key_steps, key_denoise = jax.random.split(key, 3)
    xt = graph.sample_limit(key_limit, given.tokens.shape)
    xt = reverse_steps(
        key_steps, score_fn, graph, noise, given, xt, 0, num_steps, num_steps, sampler=sampler, draw=draw
    )
    return denoise(key_denoise, score_fn, graph, noise, given, xt, draw=draw)
