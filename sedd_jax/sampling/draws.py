"""Draws the next tokens from the network, under a user's controls: the functions that a sampler calls."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs
from sedd_jax.model import controls, networks, score_draws
from sedd_jax.reverse import steps
from sedd_jax.sampling import constraints


class NetworkDraws(NamedTuple):
    """A network that draws tokens for sequences with some known tokens.

    Attributes:
        model: the network.
        graph: the graph of the forward process.
        given: known tokens.
        patterns: patterns of gaps; None if there are none.
        control: how the distribution of each token is changed.
        draw: precision of the sampling noise, a name in `score_draws.DRAWS`. Under any control it is precise.
        lengths: number of tokens of each sequence, at least 1; attention ignores the padding after them. None if no
            sequence is padded.
    """

    model: networks.Model
    graph: graphs.Graph
    given: steps.Given
    patterns: constraints.Patterns | None
    control: controls.Control
    draw: str
    lengths: Int[Array, "B"] | None = None

    @property
    def draws(self) -> steps.Draws:
        """The functions that a sampler calls."""
        of_positions = (functools.partial(fn, self.model) for fn in (score_draws.entropies, score_draws.margins))
        return steps.Draws(self._evaluate, self._draw, self._leap, *of_positions)

    def _evaluate(self, xt: Int[Array, "B L"], sigma: Array) -> steps.Evaluation:
        return steps.Evaluation(networks.apply(self.model, xt, sigma, None, self.lengths), sigma)

    def _draw(
        self,
        key: Key[Array, ""],
        evaluation: steps.Evaluation,
        xt: Int[Array, "B L"],
        is_movable: Bool[Array, "B L"],
        jump_fn: steps.JumpFn,
    ) -> Int[Array, "B L"]:
        if not self._is_controlled:
            return score_draws.DRAWS[self.draw](key, self.model, evaluation, xt, is_movable, jump_fn)
        if self.graph.mixes_uniformly:
            key, posterior = self._posterior(key, evaluation, xt)
            return posterior.draw(key, evaluation, xt, is_movable, jump_fn)
        key, key_classes = jax.random.split(key)
        choice = self._choice(key_classes, evaluation, xt)
        return score_draws.draw(key, self.model, evaluation, xt, is_movable, jump_fn, choice)

    def _leap(
        self, key: Key[Array, ""], rates: list[steps.Rates], xt: Int[Array, "B L"], is_movable: Bool[Array, "B L"]
    ) -> Int[Array, "B L"]:
        """A `steps.LeapFn`; the first of `rates` is that of an evaluation at xt."""
        choice = None
        if self._is_controlled and self.graph.mixes_uniformly:
            key, posterior = self._posterior(key, rates[0].evaluation, xt)
            return posterior.leap(key, rates, xt, is_movable)
        if self._is_controlled:
            key, key_classes = jax.random.split(key)
            choice = self._choice(key_classes, rates[0].evaluation, xt)
        return score_draws.leap(key, self.model, rates, xt, is_movable, draw=self.draw, choice=choice)

    @property
    def _is_controlled(self) -> bool:
        return self.patterns is not None or self.control != controls.Control()

    def _choice(self, key: Key[Array, ""], evaluation: steps.Evaluation, xt: Int[Array, "B L"]) -> score_draws.Choice:
        """How tokens are drawn under control. Classes in gaps with patterns are drawn jointly, so that gaps match."""
        unguided = None
        if self.control.guidance != 1:
            assert self.graph.mask_id is not None
            without = jnp.where(self.given.is_given, self.graph.mask_id, xt)
            unguided = self._evaluate(without, evaluation.sigma).features
        if self.patterns is None:
            return controls.choice(self.control, unguided)
        automaton = self.patterns.automaton
        class_of = jnp.asarray(automaton.class_of)
        shares = controls.class_log_weights(
            self.control,
            self.model,
            evaluation.features,
            unguided,
            (class_of, automaton.num_classes),
            xt,
            self._is_open(xt),
        )
        return controls.choice(self.control, unguided, class_of, self._classes(key, shares, xt))

    def _posterior(
        self, key: Key[Array, ""], evaluation: steps.Evaluation, xt: Int[Array, "B L"]
    ) -> tuple[Key[Array, ""], controls.Posterior]:
        """The next key, and how tokens of the uniform graph are drawn under control.

        Without the known text stands for a sequence in which the forward process has noised it up to now. The network
        was trained on such sequences, and at the start nothing of the text is left.
        """
        posterior = controls.Posterior(self.control, self.model)
        if self.control.guidance != 1:
            key, key_noise = jax.random.split(key)
            noised = self.graph.sample_transition(key_noise, self.given.tokens, evaluation.sigma)
            without = jnp.where(self.given.is_given, noised, xt)
            posterior = posterior._replace(unguided=self._evaluate(without, evaluation.sigma).features)
        if self.patterns is not None:
            key, key_classes = jax.random.split(key)
            automaton = self.patterns.automaton
            posterior = posterior._replace(class_of=jnp.asarray(automaton.class_of))
            shares = posterior.class_log_weights(evaluation, xt, self._is_open(xt), automaton.num_classes)
            posterior = posterior._replace(classes=self._classes(key_classes, shares, xt))
        return key, posterior

    def _is_open(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Positions of gaps with patterns that are still to be filled."""
        assert self.patterns is not None
        return jnp.asarray(self.patterns.places.is_constrained) & self.given.is_movable(self.graph, xt)

    def _classes(
        self, key: Key[Array, ""], log_weights: Float[Array, "B L C"], xt: Int[Array, "B L"]
    ) -> Int[Array, "B L"]:
        """Classes of the tokens in gaps with patterns, drawn jointly given that every gap matches."""
        assert self.patterns is not None
        automaton, places = self.patterns
        pinned = constraints.pin(log_weights, automaton, xt, ~self._is_open(xt))
        return constraints.choose_classes(key, pinned, automaton, places)
