"""Reverse steps in time, at all positions at once (Lou et al. 2023, section 4).

A step is a `scores.Jump`: the weight with which each position stays, and how its other weights follow from the score.
The caller that holds the network draws from it (`Draws`). So no sampler needs the score of every token.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, scores
from sedd_jax.reverse import correctors, time_grids


class Given(NamedTuple):
    """Known tokens: a prompt, or the text around gaps (equation 21).

    Attributes:
        tokens: known tokens; any value where unknown.
        is_given: where tokens are known.
    """

    tokens: Int[Array, "B L"]
    is_given: Bool[Array, "B L"]

    def clamp(self, xt: Int[Array, "B L"]) -> Int[Array, "B L"]:
        """xt with the known tokens written over it."""
        return jnp.where(self.is_given, self.tokens, xt)

    def is_movable(self, graph: graphs.Graph, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Positions that a reverse step may change: those with noise that are not known."""
        return graph.is_noise(xt) & ~self.is_given


def nothing_given(shape: tuple[int, int]) -> Given:
    """No known tokens, for plain generation of a batch of shape [B, L]."""
    return Given(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


class Evaluation(NamedTuple):
    """One evaluation of the network.

    Attributes:
        features: output of the network for noised tokens.
        sigma: total noise that the network was given, one for each sequence.
    """

    features: Any
    sigma: Float[Array, "B"]


class Rates(NamedTuple):
    """Rates of jumps to every other token: the score from an evaluation, times a factor (`slope`) at each position."""

    evaluation: Evaluation
    slope: Float[Array, "B L"]


# Sum of the score over all y != xt -> weights of the step.
JumpFn = Callable[[Float[Array, "B L"]], scores.Jump]
# (key, evaluation at xt, xt, positions that may move, the step) -> xt after the step.
DrawFn = Callable[[Key[Array, ""], Evaluation, Int[Array, "B L"], Bool[Array, "B L"], JumpFn], Int[Array, "B L"]]
# (key, rates, xt, positions that may move) -> xt after a leap with the sum of the rates; sums below 0 count as 0.
LeapFn = Callable[[Key[Array, ""], list[Rates], Int[Array, "B L"], Bool[Array, "B L"]], Int[Array, "B L"]]
# (evaluation at xt, xt, positions where it is needed) -> a number at each of these positions, 0 elsewhere.
PositionsFn = Callable[[Evaluation, Int[Array, "B L"], Bool[Array, "B L"]], Float[Array, "B L"]]


class Draws(NamedTuple):
    """The network and the draws from it, as functions: all that a sampler needs.

    Attributes:
        evaluate_fn: (xt, sigma) -> evaluation of the network.
        draw_fn: draws the next states from an evaluation and a step.
        leap_fn: draws the next states from rates.
        entropy_fn: entropy in nats of the token at each position, given all others.
        margins_fn: by how much the likeliest token of each position, given all others, is likelier than the next;
            probabilities are in proportion to the score.
    """

    evaluate_fn: Callable[[Int[Array, "B L"], Float[Array, "B"]], Evaluation]
    draw_fn: DrawFn
    leap_fn: LeapFn
    entropy_fn: PositionsFn
    margins_fn: PositionsFn

    def move(
        self,
        key: Key[Array, ""],
        xt: Int[Array, "B L"],
        sigma: Float[Array, "B"],
        is_movable: Bool[Array, "B L"],
        jump_fn: JumpFn,
    ) -> Int[Array, "B L"]:
        """Evaluates the network at xt, and draws the next states."""
        return self.draw_fn(key, self.evaluate_fn(xt, sigma), xt, is_movable, jump_fn)


class Batch(NamedTuple):
    """Sequences in the middle of their trajectories; each may be at a different step.

    An iteration is a step, or a corrector step after it.

    Attributes:
        given: known tokens.
        xt: current states.
        iteration: number of iterations that each sequence has taken.
        num_steps: number of steps of each sequence before its last evaluation.
        plan: what the sampler has drawn before the first step (`samplers.Sampler.begin`).
    """

    given: Given
    xt: Int[Array, "B L"]
    iteration: Int[Array, "B"]
    num_steps: Int[Array, "B"]
    plan: Any


# (key, draws, process, given, xt, time of each sequence, length of its step) -> xt one step later.
StepFn = Callable[
    [
        Key[Array, ""],
        Draws,
        forward.Process,
        Given,
        Int[Array, "B L"],
        Float[Array, "B"],
        Float[Array, "B"],
    ],
    Int[Array, "B L"],
]


def euler(
    process: forward.Process,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> scores.Jump:
    """An Euler step (equation 17): weights delta(xt, y) + dt dsigma_dt Q(xt, y) score_y.

    At y = xt, Q(xt, y) score_y stands for minus the sum of all other rates. This weight is negative if dt is too large.

    Args:
        process: the forward process.
        total: sum of the score over all y != xt.
        xt: current states.
        t: time of each sequence.
        dt: length of the step of each sequence.
    """
    rate = process.graph.reverse_rate(xt) * (dt * process.noise.dsigma_dt(t))[:, None]
    return scores.Jump(stay=1 - rate * total, slope=rate)


def tau_leaping(
    process: forward.Process,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> scores.Jump:
    """A tau-leap: rates are constant over the step (Campbell et al. 2022, section 4.3).

    A position stays with probability exp(-dt total rate), and otherwise jumps in proportion to the rates. It jumps at
    most once, since jumps of a token cannot be added up like those of a number. Arguments are those of `euler`.
    """
    rate = process.graph.reverse_rate(xt) * (dt * process.noise.dsigma_dt(t))[:, None]
    jumps = rate * total
    share = jnp.where(jumps > 0, -jnp.expm1(-jumps) / jnp.where(jumps > 0, total, 1.0), 0.0)
    return scores.Jump(stay=jnp.exp(-jumps), slope=share)


def tweedie(
    process: forward.Process,
    total: Float[Array, "B L"],
    xt: Int[Array, "B L"],
    t: Float[Array, "B"],
    dt: Float[Array, "B"],
) -> scores.Jump:
    """A Tweedie step (equations 19, 20): the optimal step that changes positions independently (theorem 4.2).

    Arguments are those of `euler`.
    """
    return process.graph.tweedie_jump(total, xt, process.noise.sigma(t) - process.noise.sigma(t - dt))


def one_evaluation(
    jump: Callable[
        [forward.Process, Float[Array, "B L"], Int[Array, "B L"], Float[Array, "B"], Float[Array, "B"]], scores.Jump
    ],
) -> StepFn:
    """A `StepFn` with one network evaluation; `jump`, such as `tweedie`, gives the weights of all states."""

    def step(
        key: Key[Array, ""],
        draws: Draws,
        process: forward.Process,
        given: Given,
        xt: Int[Array, "B L"],
        t: Float[Array, "B"],
        dt: Float[Array, "B"],
    ) -> Int[Array, "B L"]:
        is_movable = given.is_movable(process.graph, xt)
        return draws.move(key, xt, process.noise.sigma(t), is_movable, lambda total: jump(process, total, xt, t, dt))

    return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a sampler is, needs and supports. Validation, help texts, the web page and tests follow these fields.

    Attributes:
        meaning: what the sampler is, for help texts.
        evaluations: network evaluations per step.
        needs_mask: whether the graph must have a mask.
        takes_grid: whether its steps are at the times of a grid; then it has a field `grid`.
        takes_guidance: whether it supports classifier-free guidance.
        ends_with_masks: whether it needs no further evaluation once no mask is left.
        is_biased: whether more evaluations do not bring its samples to the model's distribution.
        is_adaptive: whether it may fill all masks in fewer evaluations than asked for. Results then count those taken.
        published_name: its name in the published program; "" if that lacks it.
    """

    meaning: str
    evaluations: int = 1
    needs_mask: bool = False
    takes_grid: bool = True
    takes_guidance: bool = True
    ends_with_masks: bool = False
    is_biased: bool = False
    is_adaptive: bool = False
    published_name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeStepping:
    """A sampler that steps through time from t = 1 to `time_grids.T_END`, and denoises with one last evaluation.

    After each step come `corrector_steps` corrector steps (`correctors.find`): the step is undone by the forward
    process and taken again, or its evaluations redraw tokens at the time after the step.

    Attributes:
        traits: what the sampler is, needs and supports.
        step_fn: takes one step of every sequence.
        grid: times of the steps, see `time_grids`.
        corrector_steps: corrector steps after each step.
        corrector: what a corrector step is, see `correctors.find`.
    """

    traits: Traits
    step_fn: StepFn
    grid: str = "uniform"
    corrector_steps: int = 0
    corrector: str = correctors.FORWARD_BACKWARD

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """`num_steps`, however few the gaps are."""
        del num_gaps
        return num_steps

    def begin(self, key: Key[Array, ""], process: forward.Process, given: Given) -> None:
        """Nothing is drawn beforehand."""

    def take(
        self,
        key: Key[Array, ""],
        iteration: Int[Array, ""],
        draws: Draws,
        process: forward.Process,
        batch: Batch,
        is_last: Bool[Array, "B"] | None = None,
    ) -> Int[Array, "B L"]:
        """One iteration of every sequence; see `samplers.Sampler.take`."""
        key, repeats = jax.random.fold_in(key, iteration), 1 + self.corrector_steps
        t, dt = time_grids.find(self.grid)(process.noise, batch.iteration // repeats, batch.num_steps)
        xt = batch.xt
        if repeats > 1:
            key, key_corrector = jax.random.split(key)
            is_correcting = batch.iteration % repeats > 0
            gibbs = correctors.find(self.corrector)
            if gibbs is None:
                noised = correctors.add_noise(key_corrector, process, xt, t, dt)
                xt = jnp.where(is_correcting[:, None], noised, xt)
            else:
                draws = gibbs.redrawing(key_corrector, draws, process.noise.sigma(t - dt), is_correcting)
        if is_last is not None:
            t = jnp.where(is_last, time_grids.T_END, t)
            draws = _denoising(draws, process.graph, is_last)
        return self.step_fn(key, draws, process, batch.given, batch.given.clamp(xt), t, dt)

    def finish(
        self, key: Key[Array, ""], key_last: Key[Array, ""], draws: Draws, process: forward.Process, batch: Batch
    ) -> Int[Array, "B L"]:
        """Clean tokens: `denoise` with the key of the last evaluation."""
        del key  # `take` folds iterations into it.
        return denoise(key_last, draws, process, batch.given, batch.xt)


def denoise(
    key: Key[Array, ""], draws: Draws, process: forward.Process, given: Given, xt: Int[Array, "B L"]
) -> Int[Array, "B L"]:
    """Clean tokens, without masks, by the last step from t = T_END (theorem 4.1)."""
    graph, xt = process.graph, given.clamp(xt)
    sigma = jnp.full(xt.shape[0], process.noise.sigma(jnp.float32(time_grids.T_END)))
    is_movable = given.is_movable(graph, xt)
    return draws.move(key, xt, sigma, is_movable, lambda total: graph.denoise_jump(total, xt, sigma))


def _denoising(draws: Draws, graph: graphs.Graph, is_last: Bool[Array, "B"]) -> Draws:
    """`draws` for one step, in which sequences at their last evaluation take the step of `denoise` instead.

    The first draw of the step denoises them, and no later one moves them.
    """
    calls = itertools.count()

    def draw(key, evaluation, xt, is_movable, jump_fn):
        if next(calls):
            return draws.draw_fn(key, evaluation, xt, is_movable & ~is_last[:, None], jump_fn)

        def jump(total):
            return scores.where(is_last, graph.denoise_jump(total, xt, evaluation.sigma), jump_fn(total))

        return draws.draw_fn(key, evaluation, xt, is_movable, jump)

    def leap(key, rates, xt, is_movable):
        key_leap, key_last = jax.random.split(key)
        moved = draws.leap_fn(key_leap, rates, xt, is_movable & ~is_last[:, None])
        if next(calls):
            return moved
        evaluation = rates[0].evaluation
        jump = lambda total: graph.denoise_jump(total, xt, evaluation.sigma)
        last = draws.draw_fn(key_last, evaluation, xt, is_movable & is_last[:, None], jump)
        return where(is_last, last, moved)

    return draws._replace(draw_fn=draw, leap_fn=leap)


def mask_again(
    key: Key[Array, ""], graph: Any, batch: Batch, count: Int[Array, "B"], corrector_steps: int
) -> Int[Array, "B L"]:
    """batch.xt; in sequences that are at a corrector step, `count` filled tokens are masked again, chosen uniformly.

    Args:
        key: key of the choice.
        graph: a graph with a mask.
        batch: the sequences.
        count: number of tokens to mask.
        corrector_steps: corrector steps after each step.
    """
    if not corrector_steps:
        return batch.xt
    is_filled = ~batch.given.is_given & ~graph.is_noise(batch.xt)
    masked = correctors.mask_again(key, graph.mask_id, batch.xt, is_filled, count)
    return where(batch.iteration % (1 + corrector_steps) > 0, masked, batch.xt)


def where(rows: Bool[Array, "B"], x: Array, y: Array) -> Array:
    """x for the sequences in `rows`, y for the others."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
