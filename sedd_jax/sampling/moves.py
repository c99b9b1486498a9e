"""From the network to the next tokens: what a sampler asks for, drawn under the controls of a user."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import graphs, samplers, trapezoidal
from sedd_jax.model import controls, networks, score_draws
from sedd_jax.sampling import constraints


class Patterns(NamedTuple):
    """What the text of gaps is to match, and where they are."""

    automaton: constraints.Automaton
    places: constraints.Places


class Mover(NamedTuple):
    """A network that draws tokens for sequences of which some are given.

    Attributes:
        network: its sizes.
        params: its parameters.
        graph: the forward process.
        given: known tokens.
        patterns: of gaps; None where there are none.
        control: how the law of tokens is changed.
        draw: a name in `score_draws.DRAWS`; precise where tokens are under any control.
        lengths: tokens of each sequence, at least 1, before padding that nobody attends to; None where there is none.
    """

    network: networks.NetworkConfig
    params: networks.Params
    graph: graphs.Graph
    given: samplers.Given
    patterns: Patterns | None
    control: controls.Control
    draw: str
    lengths: Int[Array, "B"] | None = None

    def move(
        self,
        key: Key[Array, ""],
        xt: Int[Array, "B L"],
        sigma: Float[Array, "B"],
        is_movable: Bool[Array, "B L"],
        jump_fn: samplers.JumpFn,
        at: Int[Array, "B L"] | None = None,
    ) -> Int[Array, "B L"]:
        """A `samplers.MoveFn`; the causal network draws in place of other states than it reads, those of `at`."""
        return self.draw_from(key, self.evaluate(xt, sigma), xt if at is None else at, sigma, is_movable, jump_fn)

    def draw_from(
        self,
        key: Key[Array, ""],
        features: Float[Array, "B L D"],
        xt: Int[Array, "B L"],
        sigma: Float[Array, "B"],
        is_movable: Bool[Array, "B L"],
        jump_fn: samplers.JumpFn,
    ) -> Int[Array, "B L"]:
        """`move` from what the network has made of xt."""
        if not self._is_controlled:
            draw = score_draws.DRAWS[self.draw]
            return draw(key, self.network, self.params, features, xt, sigma, is_movable, jump_fn)
        key, key_classes = jax.random.split(key)
        choice = self._choice(key_classes, features, xt, sigma)
        return score_draws.draw(key, self.network, self.params, features, xt, sigma, is_movable, jump_fn, choice)

    def leap(
        self,
        key: Key[Array, ""],
        evaluations: list[trapezoidal.Evaluation],
        xt: Int[Array, "B L"],
        is_movable: Bool[Array, "B L"],
    ) -> Int[Array, "B L"]:
        """A `trapezoidal.LeapFn`; the first evaluation is the one at xt."""
        choice = None
        if self._is_controlled:
            key, key_classes = jax.random.split(key)
            choice = self._choice(key_classes, evaluations[0].features, xt, evaluations[0].sigma)
        return score_draws.leap(
            key, self.network, self.params, evaluations, xt, is_movable, draw=self.draw, choice=choice
        )

    def evaluate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Any:
        """A `trapezoidal.EvaluateFn`."""
        return networks.apply(self.network, self.params, xt, sigma, None, self.lengths)

    @property
    def _is_controlled(self) -> bool:
        return self.patterns is not None or self.control != controls.Control()

    def _choice(
        self, key: Key[Array, ""], features: Float[Array, "B L D"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]
    ) -> score_draws.Choice:
        """Tokens under control; the classes of all gaps with patterns are drawn together, so that the rest fits."""
        unguided = None
        if self.control.guidance != 1:
            assert isinstance(self.graph, graphs.Absorbing)
            unguided = self.evaluate(jnp.where(self.given.is_given, self.graph.mask_id, xt), sigma)
        if self.patterns is None:
            return controls.choice(self.control, unguided)
        automaton, places = self.patterns
        class_of = jnp.asarray(automaton.class_of)
        is_open = jnp.asarray(places.is_constrained) & self.graph.is_noise(xt) & ~self.given.is_given
        shares = controls.class_log_weights(
            self.control, self.network, self.params, features, unguided, class_of, automaton.num_classes, xt, is_open
        )
        pinned = constraints.pin(shares, automaton, xt, ~is_open)
        classes = constraints.choose_classes(key, pinned, automaton, places)
        return controls.choice(self.control, unguided, class_of, classes)
