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


class _Options(NamedTuple):
    """What else the weights of a position depend on under control; each is None if there is none.

    Attributes:
        unguided: features for a sequence whose known tokens are noised.
        classes: class that the clean token must have; -1 for any.
        is_clean: where the next state must have this class, too.
    """

    unguided: Float[Array, "*p D"] | None
    classes: Int[Array, "*p"] | None
    is_clean: Bool[Array, "*p"] | None = None


class Posterior(NamedTuple):
    """Draws of the uniform graph under control: changes r, then steps with the score that follows.

    With alpha = e^-sigma, r_y = (s_y / sum s - (1 - alpha) / N) / alpha, clipped at 0 and normalised. The changed r
    gives the score (N alpha r_y + 1 - alpha) / (N alpha r_xt + 1 - alpha). The score itself is mostly noise: a nucleus
    of it would cut tokens of the text first. Guidance changes the score before r follows from it, since its logarithm
    is bounded (Nisonoff et al. 2024, section 3). A pattern leaves the tokens of one class in r.

    Attributes:
        control: how r is changed.
        model: the network.
        unguided: features for sequences whose known tokens are noised; None if there is no guidance.
        class_of: class of every state; None if every token is allowed.
        classes: class that the clean token of each position must have; -1 for any.
    """

    control: Control
    model: networks.Model
    unguided: Float[Array, "B L D"] | None = None
    class_of: Int[Array, "V"] | None = None
    classes: Int[Array, "B L"] | None = None

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
        return self._draw(key, weights, noise, is_movable, jump.stay, jump.is_clean)

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

    def class_log_weights(
        self, evaluation: steps.Evaluation, xt: Int[Array, "B L"], is_needed: Bool[Array, "B L"], num_classes: int
    ) -> Float[Array, "B L C"]:
        """Log probability of each class of clean tokens given xt, in proportion to r_y p(xt | y).

        Always finite; 0 where not `is_needed`. It reads `class_of`, but not `classes`.
        """
        assert self.class_of is not None
        class_of = self.class_of

        def of_rows(states: tiles.States, weights: score_draws.Weights, noise: Array, options: _Options) -> Array:
            log_r = self._log_r(states, weights.features[:, 0], weights.xt, noise[:, :1], options)
            own = jnp.where(states.equal_to(weights.xt), jnp.exp(noise[:, :1]), 0.0)
            return _log_shares(jnp.exp(log_r) * (1 + own), class_of[states.ids], num_classes)

        zeros = jnp.zeros((*xt.shape, num_classes))
        return self._visit(self._scores([evaluation], xt), _Options(self.unguided, None), is_needed, of_rows, zeros)

    def _scores(
        self, evaluations: Sequence[steps.Evaluation], xt: Int[Array, "B L"]
    ) -> tuple[score_draws.Weights, Float[Array, "B L E"]]:
        """The controlled scores as weights of slope 1, and log(N / (e^sigma - 1)) of each evaluation."""
        features = jnp.stack([one.features for one in evaluations], axis=2)
        noise = jnp.stack([score_heads.log_noise(self.model.config, one.sigma, xt) for one in evaluations], axis=-1)
        return score_draws.Weights(features, xt, jnp.zeros_like(noise), jnp.ones_like(noise)), noise

    def _visit(
        self,
        scored: tuple[score_draws.Weights, Float[Array, "B L E"]],
        options: _Options,
        is_needed: Bool[Array, "B L"],
        of_rows: Callable[..., Any],
        out: Any,
        *arrays: Any,
    ) -> Any:
        """`out` with of_rows(all states, weights, noise, options, *arrays) written where `is_needed`."""

        def over_rows(vocabulary: tiles.Vocabulary, weights: score_draws.Weights, *rest: Any) -> Any:
            out, is_needed, *inputs = rest
            size = score_draws.whole_rows(is_needed.size, len(vocabulary.bias))
            return _visit_whole_rows(vocabulary, is_needed, (weights, *inputs), of_rows, out, size)

        weights, noise = scored
        return score_draws.over_head(self.model, over_rows, weights, out, is_needed, noise, options, *arrays)

    def _sum(
        self, weights: score_draws.Weights, noise: Float[Array, "B L E"], is_needed: Bool[Array, "B L"]
    ) -> Float[Array, "B L"]:
        of_rows = lambda *inputs: self._of_rows(*inputs).sum(-1)
        options = _Options(self.unguided, self.classes)
        return self._visit((weights, noise), options, is_needed, of_rows, jnp.zeros(is_needed.shape))

    def _draw(
        self,
        key: Key[Array, ""],
        weights: score_draws.Weights,
        noise: Float[Array, "B L E"],
        is_movable: Bool[Array, "B L"],
        stay: Float[Array, "B L"],
        is_clean: Bool[Array, "B L"] | None = None,
    ) -> Int[Array, "B L"]:
        def of_rows(
            states: tiles.States, weights: score_draws.Weights, noise: Array, options: _Options, *rest: Array
        ) -> Int[Array, " r"]:
            row_keys, stay = rest
            of_row = self._of_rows(states, weights, noise, options)
            of_row = jnp.where(states.equal_to(weights.xt), stay[:, None], of_row)
            is_allowed = _allowed(self.class_of, states, options.classes)
            if options.is_clean is not None and is_allowed is not None:
                of_row = jnp.where(is_allowed | ~options.is_clean[:, None], of_row, 0.0)
            return states.ids[jax.vmap(categoricals.draw)(jax.random.wrap_key_data(row_keys), of_row)]

        keys = jax.random.key_data(score_draws.position_keys(key, weights.xt))
        options = _Options(self.unguided, self.classes, is_clean)
        return self._visit((weights, noise), options, is_movable, of_rows, weights.xt, keys, stay)

    def _of_rows(
        self, states: tiles.States, weights: score_draws.Weights, noise: Float[Array, "r E"], options: _Options
    ) -> Float[Array, "r v"]:
        """Weights of all states but xt, from the controlled scores."""
        others, current = states.other_than(weights.xt), states.equal_to(weights.xt)
        total = jnp.zeros(others.shape)
        for e in range(noise.shape[1]):
            log_noise = noise[:, e, None]
            mixed = jax.nn.softplus(
                self._log_r(states, weights.features[:, e], weights.xt, log_noise, options) + log_noise
            )
            at_xt = jnp.where(current, mixed, 0.0).sum(-1, keepdims=True)
            total += weights.slope[:, e, None] * jnp.exp(mixed - at_xt)
        if weights.offset is not None:
            total += weights.offset[:, None]
        return jnp.where(others, jnp.maximum(total, 0.0), 0.0)

    def _log_r(
        self,
        states: tiles.States,
        features: Float[Array, "r D"],
        xt: Int[Array, " r"],
        log_noise: Float[Array, "r 1"],
        options: _Options,
    ) -> Float[Array, "r v"]:
        """Log of the changed distribution of the clean token given all other positions."""
        is_state, current = states.other_than(xt) | states.equal_to(xt), states.equal_to(xt)

        def log_score(features: Float[Array, "r D"]) -> Float[Array, "r v"]:
            """Up to a constant of each row."""
            z = jnp.where(is_state, states.logits(features), -jnp.inf)
            if self.model.config.mixes_uniformly:
                return jax.nn.softplus(jax.nn.log_softmax(z, axis=-1) + log_noise)
            return jnp.where(current, 0.0, z)

        if options.unguided is None and self.model.config.mixes_uniformly:
            log_r = logits = jnp.where(is_state, states.logits(features), -jnp.inf)
        else:
            logits = log_score(features)
            if options.unguided is not None:
                without = log_score(options.unguided)
                logits = jnp.where(is_state, without + self.control.guidance * (logits - without), -jnp.inf)
            # Probabilities in proportion to the score, less those of noise, (1 - alpha) / N.
            of_noise = jax.nn.sigmoid(jnp.log(jnp.float32(self.model.config.num_states)) - log_noise)
            r = jax.nn.softmax(logits, axis=-1) - of_noise / self.model.config.num_states
            log_r = jnp.where((r > 0) & is_state, jnp.log(jnp.where(r > 0, r, 1.0)), -jnp.inf)
        is_allowed = _allowed(self.class_of, states, options.classes)
        return jax.nn.log_softmax(reweigh(self.control, log_r, logits, None, is_state, is_allowed), axis=-1)


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
        return _log_shares(of_row, class_of[states.ids], num_classes)

    def over_rows(
        vocabulary: tiles.Vocabulary, weights: score_draws.Weights, is_needed: Array, unguided: Array | None
    ) -> Array:
        zeros = jnp.zeros((*weights.xt.shape, num_classes))
        return _visit_whole_rows(vocabulary, is_needed, (weights, unguided), of_rows, zeros)

    one = jnp.ones((*xt.shape, 1))
    weights = score_draws.Weights(features[:, :, None], xt, 0 * one, one)
    return score_draws.over_head(model, over_rows, weights, is_needed, unguided)


def _log_shares(weights: Float[Array, "r v"], class_of: Int[Array, " v"], num_classes: int) -> Float[Array, "r C"]:
    """Log of the share of each class in the weights of its states; always finite."""
    shares = jnp.matmul(weights, jax.nn.one_hot(class_of, num_classes), precision="highest")
    return jnp.log(jnp.maximum(shares / weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny))


def _allowed(
    class_of: Int[Array, "V"] | None, states: tiles.States, classes: Int[Array, " r"] | None
) -> Bool[Array, "r v"] | None:
    """Which states the class of each row allows; None if all."""
    if class_of is None or classes is None:
        return None
    return (class_of[states.ids][None] == classes[:, None]) | (classes < 0)[:, None]


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
    is_allowed = _allowed(class_of, states, classes)
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
