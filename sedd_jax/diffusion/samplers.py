"""Samplers: the reverse process in steps of dt, every position at once (Lou et al. 2023, section 4).

A step is a `graphs.Jump`: how likely each position stays, and how its other weights follow from the score. Who holds
the score draws from it (`MoveFn`), so that no sampler needs the score of every token. Between steps a trajectory may
correct itself: it goes back to the time before, by the forward process, and takes the step again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs, noise_schedules, time_grids

# The sum of the score over all y != xt -> the law of the step.
JumpFn = Callable[[Float[Array, "B L"]], graphs.Jump]
# (key, xt, sigma, positions that may move, law of the step) -> xt after it.
MoveFn = Callable[[Key[Array, ""], Int[Array, "B L"], Float[Array, "B"], Bool[Array, "B L"], JumpFn], Int[Array, "B L"]]
# (key, xt, time of each sequence, length of its step) -> xt a step later.
PredictFn = Callable[[Key[Array, ""], Int[Array, "B L"], Float[Array, "B"], Float[Array, "B"]], Int[Array, "B L"]]


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
    dt: Float[Array, "B"],
) -> graphs.Jump:
    """An Euler step (equation 17): delta(xt, y) + dt dsigma_dt Q(xt, y) score_y.

    At y = xt the rates count minus their sum, which makes that weight negative where dt is too large for them.

    Args:
        graph: the forward process.
        noise: the schedule.
        total: sum of the score over all y != xt.
        xt: current states.
        t: time of each sequence.
        dt: length of its step.
    """
    rate = graph.reverse_rate(xt) * (dt * noise.dsigma_dt(t))[:, None]
    return graphs.Jump(stay=1 - rate * total, slope=rate)


def tau_leaping(
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
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
    dt: Float[Array, "B"],
) -> graphs.Jump:
    """A Tweedie step (equations 19, 20): the best that moves positions independently (theorem 4.2).

    Args are those of `euler`.
    """
    return graph.tweedie_jump(total, xt, noise.sigma(t) - noise.sigma(t - dt))


SAMPLERS = {"euler": euler, "tau_leaping": tau_leaping, "tweedie": tweedie}


def predictor(
    move_fn: MoveFn, graph: graphs.Graph, noise: noise_schedules.NoiseSchedule, given: Given, *, sampler: str
) -> PredictFn:
    """A step of one evaluation.

    Args:
        move_fn: draws the next states from the network's score and the law of the step.
        graph: the forward process.
        noise: the schedule.
        given: known tokens, which do not move.
        sampler: a name in `SAMPLERS`.
    """
    jump = SAMPLERS[sampler]

    def predict(
        key: Key[Array, ""], xt: Int[Array, "B L"], t: Float[Array, "B"], dt: Float[Array, "B"]
    ) -> Int[Array, "B L"]:
        is_movable = graph.is_noise(xt) & ~given.is_given
        return move_fn(key, xt, noise.sigma(t), is_movable, lambda total: jump(graph, noise, total, xt, t, dt))

    return predict


def reverse_steps(
    key: Key[Array, ""],
    predict_fn: PredictFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    num_steps: Int[Array, ""] | int,
    *,
    grid: str = "uniform",
    corrector_steps: int = 0,
) -> Int[Array, "B L"]:
    """Takes the reverse steps `start` to `stop` of `num_steps`, from t = 1 (step 0) toward `time_grids.T_END`.

    Each step's key is folded from its number, so any split into calls gives the same tokens, and the numbers may be
    traced: one compilation serves every number of steps.

    Args:
        key: base key of the whole trajectory.
        predict_fn: takes a step.
        graph: the forward process.
        noise: the schedule.
        given: known tokens, clamped before every evaluation.
        xt: state before step `start`.
        start: first step to take.
        stop: step to stop before.
        num_steps: steps of the whole trajectory.
        grid: where they lie in time, see `time_grids`.
        corrector_steps: how often each is taken again, see `turn`.
    """
    turns = 1 + corrector_steps

    def take(number: Int[Array, ""], xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        numbers = jnp.full(xt.shape[0], number)
        total = jnp.asarray(num_steps)
        own_key = jax.random.fold_in(key, number)
        return turn(own_key, predict_fn, graph, noise, given, xt, numbers, total, grid=grid, turns=turns)

    return jax.lax.fori_loop(start * turns, stop * turns, take, xt)


def turn(
    key: Key[Array, ""],
    predict_fn: PredictFn,
    graph: graphs.Graph,
    noise: noise_schedules.NoiseSchedule,
    given: Given,
    xt: Int[Array, "B L"],
    number: Int[Array, "B"],
    num_steps: Int[Array, "*B"],
    *,
    grid: str,
    turns: int,
) -> Int[Array, "B L"]:
    """Takes a step of each sequence for the first time, or again: `turns` times each.

    Before a step is taken again the forward process leads back to its start. That changes nothing in the law of xt
    where steps are exact (Campbell et al. 2022, section 4.4); where they are not it lets tokens drawn too early be
    drawn anew (Wang et al. 2025, remasking).

    Args:
        key: of this turn.
        predict_fn: takes a step.
        graph: the forward process.
        noise: the schedule.
        given: known tokens.
        xt: state before the step, or after it where it has been taken.
        number: turns that each sequence has taken.
        num_steps: steps of each sequence, or of all.
        grid: where they lie in time.
        turns: of a step.
    """
    t, dt = time_grids.find(grid)(noise, number // turns, num_steps)
    if turns > 1:
        key, key_noise = jax.random.split(key)
        noised = graph.sample_transition(key_noise, xt, noise.sigma(t) - noise.sigma(t - dt))
        xt = jnp.where((number % turns > 0)[:, None], noised, xt)
    return predict_fn(key, given.clamp(xt), t, dt)


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
    sigma = jnp.full(xt.shape[0], noise.sigma(jnp.float32(time_grids.T_END)))
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

    Args are those of `predictor` and `reverse_steps`.
    """
    key_limit, key_steps, key_denoise = jax.random.split(key, 3)
    xt = graph.sample_limit(key_limit, given.tokens.shape)
    predict = predictor(move_fn, graph, noise, given, sampler=sampler)
    xt = reverse_steps(key_steps, predict, graph, noise, given, xt, 0, num_steps, num_steps)
    return denoise(key_denoise, move_fn, graph, noise, given, xt)
