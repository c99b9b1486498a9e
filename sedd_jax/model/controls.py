"""Controls of a token's distribution: temperature, nucleus (top-p) sampling, classifier-free guidance and patterns.

The sampler decides whether a position moves; the controls change which token it gets. On the uniform graph they change
the distribution r of the clean token given all other positions, from which the score is mixed again (`Posterior`).
They change the distribution of samples on purpose, and results name them. Arrays over the whole vocabulary are held for
a few positions at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.model import categoricals, networks, score_draws, score_heads, tiles
from sedd_jax.reverse import steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """How the distribution of a token is changed.

    Attributes:
        temperature: divides the log probabilities; below 1, likely tokens are drawn even more often (annealing).
        top_p: nucleus (top-p) sampling: only the likeliest tokens with this total probability are drawn (annealing;
            Holtzman et al. 2020).
        guidance: classifier-free guidance scale. 1 is the model's own distribution; a larger one follows the known
            tokens more closely (Ho and Salimans 2022; for masked models Nie et al. 2024).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0


def reweigh(
    control: Control,
    log_weights: Float[Array, "r v"],
    logits: Float[Array, "r v"],
    unguided: Float[Array, "r v"] | None,
    is_possible: Bool[Array, "r v"],
    is_allowed: Bool[Array, "r v"] | None = None,
) -> Float[Array, "r v"]:
    """Log weights of tokens under control, for r positions and v tokens; the highest of a position is 0.

    With guidance w they are u + w (c - u), where c are the logits and u those without the known tokens.

    Args:
        control: how the distribution is changed.
        log_weights: log weights of the sampler's step, up to a constant.
        logits: logits of the network. They decide where all weights of the step are 0 in float32.
        unguided: logits without the known tokens; None if there is no guidance.
        is_possible: which tokens may be drawn.
        is_allowed: which tokens a pattern allows; None if all. The nucleus (`top_p`) is taken of all tokens, and then
            reduced to those allowed. If none of it is allowed, the nucleus is that of the allowed tokens.
    """
    if unguided is not None:
        log_weights = logits = unguided + control.guidance * (logits - unguided)

    def reweighed(is_possible: Bool[Array, "r v"]) -> Float[Array, "r v"]:
        found = jnp.where(is_possible, log_weights, -jnp.inf)
        is_lost = ~jnp.isfinite(found.max(-1, keepdims=True))
        found = categoricals.relative(jnp.where(is_possible & is_lost, logits, found)) / control.temperature
        return found if control.top_p == 1 else _likeliest(found, control.top_p)

    if is_allowed is None:
        return reweighed(is_possible)
    alone = reweighed(is_possible & is_allowed)
    if control.top_p == 1:
        return alone
    of_all = jnp.where(is_allowed, reweighed(is_possible), -jnp.inf)
    return jnp.where(jnp.isfinite(of_all).any(-1, keepdims=True), categoricals.relative(of_all), alone)


def _likeliest(log_weights: Float[Array, "r v"], top_p: float) -> Float[Array, "r v"]:
    """Log weights of the nucleus: the likeliest tokens, whose shares sum to `top_p`; minus infinity for all others."""
    shares = jax.nn.softmax(log_weights, axis=-1)
    ranked = jnp.sort(shares, axis=-1, descending=True)
    is_kept = jnp.cumsum(ranked, axis=-1) - ranked < top_p
    least = jnp.where(is_kept, ranked, jnp.inf).min(-1, keepdims=True)
    return jnp.where(shares >= least, log_weights, -jnp.inf)


def choice(
    control: Control,
    unguided: Float[Array, "B L D"] | None = None,
    class_of: Int[Array, "V"] | None = None,
    classes: Int[Array, "B L"] | None = None,
) -> score_draws.Choice:
    """How tokens are drawn under control.

    Args:
        control: how the distribution is changed.
        unguided: features without the known tokens; None if there is no guidance.
        class_of: class of every state; None if every token is allowed.
        classes: class that the token of each position must have; -1 for any.
    """

    def draw(
        vocabulary: tiles.Vocabulary,
        weights: score_draws.Weights,
        keys: Array,
        moves: Bool[Array, "B L"],
        unguided: Float[Array, "B L D"] | None,
        classes: Int[Array, "B L"] | None,
    ) -> Int[Array, "B L"]:
        def of_rows(states: tiles.States, row_keys: Array, *inputs: Any) -> Int[Array, " r"]:
            of_row = jnp.exp(_of_rows(control, class_of, states, *inputs))
            return states.ids[jax.vmap(categoricals.draw)(jax.random.wrap_key_data(row_keys), of_row)]

        return _visit_whole_rows(vocabulary, moves, (keys, weights, unguided, classes), of_rows, weights.xt)

    return score_draws.Choice(draw, (unguided, classes))


class Posterior(NamedTuple):
    """Draws of the uniform graph under temperature and nucleus: changes r, then steps with the score that follows.

    With alpha = e^-sigma, r_y = (s_y / sum s - (1 - alpha) / N) / alpha, clipped at 0 and normalised. The changed r
    gives the score (N alpha r_y + 1 - alpha) / (N alpha r_xt + 1 - alpha). The score itself is mostly noise: a nucleus
    of it would cut tokens of the text first.

    Attributes:
        control: how r is changed; without guidance.
        model: the network.
    """

    control: Control
    model: networks.Model

    def draw(
        self,
        key: Key[Array, ""],
        evaluation: steps.Evaluation,
        xt: Int[Array, "B L"],
        is_movable: Bool[Array, "B L"],
        jump_fn: steps.JumpFn,
    ) -> Int[Array, "B L"]:
        """As `score_draws.draw`."""
        weights, noise = self._scores([evaluation], xt)
        jump = jump_fn(self._sum(weights, noise, is_movable))
        weights = weights._replace(slope=jump.slope[..., None], offset=jump.offset)
        return self._draw(key, weights, noise, is_movable, jump.stay)

    def leap(
        self,
        key: Key[Array, ""],
        rates: Sequence[steps.Rates],
        xt: Int[Array, "B L"],
        is_movable: Bool[Array, "B L"],
    ) -> Int[Array, "B L"]:
        """As `score_draws.leap`."""
        weights, noise = self._scores([one.evaluation for one in rates], xt)
        weights = weights._replace(slope=jnp.stack([one.slope for one in rates], axis=-1))
        total = self._sum(weights, noise, is_movable)
        share = jnp.where(total > 0, -jnp.expm1(-total) / jnp.where(total > 0, total, 1.0), 0.0)
        weights = weights._replace(slope=share[..., None] * weights.slope)
        return self._draw(key, weights, noise, is_movable, jnp.exp(-total))

    def _scores(
        self, evaluations: Sequence[steps.Evaluation], xt: Int[Array, "B L"]
    ) -> tuple[score_draws.Weights, Float[Array, "B L E"]]:
        """The controlled scores as weights of slope 1, and log(N / (e^sigma - 1)) of each evaluation."""
        features = jnp.stack([one.features for one in evaluations], axis=2)
        noise = jnp.stack([score_heads.log_noise(self.model.config, one.sigma, xt) for one in evaluations], axis=-1)
        return score_draws.Weights(features, xt, jnp.zeros_like(noise), jnp.ones_like(noise)), noise

    def _sum(
        self, weights: score_draws.Weights, noise: Float[Array, "B L E"], is_needed: Bool[Array, "B L"]
    ) -> Float[Array, "B L"]:
        def over_rows(vocabulary: tiles.Vocabulary, weights: score_draws.Weights, noise: Array, is_needed: Array):
            of_rows = lambda states, *inputs: self._of_rows(states, *inputs).sum(-1)
            size = score_draws.whole_rows(is_needed.size, len(vocabulary.bias))
            return _visit_whole_rows(vocabulary, is_needed, (weights, noise), of_rows, jnp.zeros(is_needed.shape), size)

        return score_draws.over_head(self.model, over_rows, weights, noise, is_needed)

    def _draw(
        self,
        key: Key[Array, ""],
        weights: score_draws.Weights,
        noise: Float[Array, "B L E"],
        is_movable: Bool[Array, "B L"],
        stay: Float[Array, "B L"],
    ) -> Int[Array, "B L"]:
        def of_rows(states: tiles.States, row_keys: Array, weights: score_draws.Weights, noise: Array, stay: Array):
            options = jnp.where(states.equal_to(weights.xt), stay[:, None], self._of_rows(states, weights, noise))
            return states.ids[jax.vmap(categoricals.draw)(jax.random.wrap_key_data(row_keys), options)]

        def over_rows(vocabulary: tiles.Vocabulary, weights: score_draws.Weights, keys: Array, *arrays: Array):
            noise, stay, is_movable = arrays
            size = score_draws.whole_rows(is_movable.size, len(vocabulary.bias))
            inputs = keys, weights, noise, stay
            return _visit_whole_rows(vocabulary, is_movable, inputs, of_rows, weights.xt, size)

        keys = jax.random.key_data(score_draws.position_keys(key, weights.xt))
        return score_draws.over_head(self.model, over_rows, weights, keys, noise, stay, is_movable)

    def _of_rows(
        self, states: tiles.States, weights: score_draws.Weights, noise: Float[Array, "r E"]
    ) -> Float[Array, "r v"]:
        """Weights of all states but xt, from the controlled scores."""
        others, current = states.other_than(weights.xt), states.equal_to(weights.xt)
        total = jnp.zeros(others.shape)
        for e in range(noise.shape[1]):
            log_noise = noise[:, e, None]
            z = jnp.where(others | current, states.logits(weights.features[:, e]), -jnp.inf)
            log_r = z
            if not self.model.config.mixes_uniformly:
                # Probabilities in proportion to the score, less those of noise, (1 - alpha) / N.
                probs = jax.nn.softmax(jnp.where(current, 0.0, z), axis=-1)
                of_noise = jax.nn.sigmoid(jnp.log(jnp.float32(self.model.config.num_states)) - log_noise)
                r = probs - of_noise / self.model.config.num_states
                log_r = jnp.where((r > 0) & (others | current), jnp.log(jnp.where(r > 0, r, 1.0)), -jnp.inf)
            log_r = jax.nn.log_softmax(reweigh(self.control, log_r, log_r, None, others | current), axis=-1)
            mixed = jax.nn.softplus(log_r + log_noise)
            at_xt = jnp.where(current, mixed, 0.0).sum(-1, keepdims=True)
            total += weights.slope[:, e, None] * jnp.exp(mixed - at_xt)
        if weights.offset is not None:
            total += weights.offset[:, None]
        return jnp.where(others, jnp.maximum(total, 0.0), 0.0)


def class_log_weights(
    control: Control,
    model: networks.Model,
    features: Float[Array, "B L D"],
    unguided: Float[Array, "B L D"] | None,
    automaton_classes: tuple[Int[Array, "V"], int],
    xt: Int[Array, "B L"],
    is_needed: Bool[Array, "B L"],
) -> Float[Array, "B L C"]:
    """Log probability of each class of tokens under control, always finite, where `is_needed`; 0 elsewhere.

    Args:
        control: how the distribution is changed.
        model: the network.
        features: its output at xt.
        unguided: its output without the known tokens; None if there is no guidance.
        automaton_classes: class of every state, and the number C of classes.
        xt: current states.
        is_needed: positions at which it is needed.
    """
    class_of, num_classes = automaton_classes

    def of_rows(states: tiles.States, *inputs: Any) -> Float[Array, "r C"]:
        of_row = jnp.exp(_of_rows(control, None, states, *inputs, classes=None))
        shares = jnp.matmul(of_row, jax.nn.one_hot(class_of[states.ids], num_classes), precision="highest")
        return jnp.log(jnp.maximum(shares / of_row.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny))

    def over_rows(
        vocabulary: tiles.Vocabulary, weights: score_draws.Weights, is_needed: Array, unguided: Array | None
    ) -> Array:
        zeros = jnp.zeros((*weights.xt.shape, num_classes))
        return _visit_whole_rows(vocabulary, is_needed, (weights, unguided), of_rows, zeros)

    one = jnp.ones((*xt.shape, 1))
    weights = score_draws.Weights(features[:, :, None], xt, 0 * one, one)
    return score_draws.over_head(model, over_rows, weights, is_needed, unguided)


def _of_rows(
    control: Control,
    class_of: Int[Array, "V"] | None,
    states: tiles.States,
    weights: score_draws.Weights,
    unguided: Float[Array, "r D"] | None,
    classes: Int[Array, " r"] | None,
) -> Float[Array, "r v"]:
    """`reweigh` applied to the weights of a step, for r positions and the v states of a block."""
    found = weights.of(states)
    is_allowed = None
    if class_of is not None and classes is not None:
        is_allowed = (class_of[states.ids][None] == classes[:, None]) | (classes < 0)[:, None]
    of_step = jnp.where(found > 0, jnp.log(jnp.where(found > 0, found, 1.0)), -jnp.inf)
    without = None if unguided is None else states.logits(unguided)
    logits = states.logits(weights.features[:, 0])
    return reweigh(control, of_step, logits, without, states.other_than(weights.xt), is_allowed)


def _visit_whole_rows(
    vocabulary: tiles.Vocabulary,
    chosen: Bool[Array, "B L"],
    inputs: tuple[Any, ...],
    of_rows: Callable[..., Any],
    out: Any,
    size: int | None = None,
) -> Any:
    """`out` with of_rows(all states, *inputs at some positions) written at the chosen positions, `size` at a time."""
    states = vocabulary._replace(width=len(vocabulary.bias)).block(jnp.asarray(0))
    rows = tiles.choose(chosen, score_draws.drawn_rows(chosen.size) if size is None else size)

    def visit(i: Int[Array, ""], flat: Any) -> Any:
        chunk = tiles.Rows(rows.chunk(rows.order, i), rows.count, rows.size)
        values = of_rows(states, *score_draws.gather(chunk, inputs))
        return flat.at[chunk.order].set(values.astype(flat.dtype), mode="drop")

    return rows.visit(visit, out.reshape(-1, *out.shape[2:])).reshape(out.shape)
