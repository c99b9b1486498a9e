"""The uniform graph: every token turns into every token (Lou et al. 2023, equation 15)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import pairs, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every token turns into every token at rate 1/N: Q = 1/N - identity (equation 15, divided by N).

    Attributes:
        vocab_size: number N of real tokens; there are no other states.
    """

    meaning: ClassVar[str] = "tokens turn into any token"
    has_mask: ClassVar[bool] = False
    has_cross_entropy: ClassVar[bool] = False
    scales_by_sigma: ClassVar[bool] = False
    mixes_uniformly: ClassVar[bool] = True

    vocab_size: int

    @classmethod
    def from_tokenizer(cls, vocab_size: int, mask_id: int | None) -> "Uniform":
        """The graph over a tokenizer's tokens. If the tokenizer has a mask token, it counts as one of them."""
        return cls(vocab_size=vocab_size if mask_id is None else vocab_size + 1)

    @property
    def num_states(self) -> int:
        return self.vocab_size

    @property
    def mask_id(self) -> None:
        """None: there is no mask."""
        return None

    def rate_column(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Column x of Q: the rates out of x."""
        return jnp.where(scores.is_state(x, self.num_states), 1 / self.num_states - 1, 1 / self.num_states)

    def rate_row(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Row x of Q: the rates into x. Q is symmetric."""
        return self.rate_column(x)

    def transition_column(self, x0: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every xt: column x0 of exp(sigma Q)."""
        redraw_prob = -jnp.expm1(-sigma)[:, None, None]
        stay = 1 - redraw_prob * ((self.num_states - 1) / self.num_states)
        return jnp.where(scores.is_state(x0, self.num_states), stay, redraw_prob / self.num_states)

    def transition_row(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every x0: row xt of exp(sigma Q), which is symmetric."""
        return self.transition_column(xt, sigma)

    def sample_transition(
        self, key: Key[Array, ""], x0: Int[Array, "B L"], sigma: Float[Array, "B"], *, paired: bool = False
    ) -> Int[Array, "B L"]:
        """Draws xt given x0: with probability 1 - e^-sigma a token is replaced by any of all N, itself included."""
        key_move, key_token = jax.random.split(key)
        move = pairs.uniform(key_move, x0.shape, paired) < -jnp.expm1(-sigma)[:, None]
        return jnp.where(move, jax.random.randint(key_token, x0.shape, 0, self.num_states, x0.dtype), x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "B L"]:
        """Draws from the limit of infinite noise: uniform tokens."""
        return jax.random.randint(key, shape, 0, self.num_states, jnp.int32)

    def reverse_rate(self, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Q(xt, y) for y != xt. Times score_y it is the rate of the reverse process from xt to y (definition 3.5)."""
        return jnp.full(xt.shape, 1 / self.num_states)

    def leap_time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time scale on which every token turns into every other at rate 1/N: sigma itself."""
        return sigma

    def sigma_at(self, leap_time: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The noise at a `leap_time`."""
        return leap_time

    def leap_rate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L"]:
        """Factor of score_y in the rate from xt to y != xt, per unit of `leap_time`."""
        del sigma
        return self.reverse_rate(xt)

    def tweedie_jump(
        self, total: Float[Array, "B L"], xt: Int[Array, "B L"], delta_sigma: Float[Array, "B"]
    ) -> scores.Jump:
        """The Tweedie step, weights [exp(-dQ) score]_y exp(dQ)(xt, y), d = delta_sigma (equation 19).

        Errors of the score are multiplied by e^d. If one step removes much noise (few steps, geometric schedule with
        sigma_max = 20), the weights are mostly error, as in the published program. Take more steps, or use `euler`.

        Args:
            total: sum of the score over all y != xt.
            xt: current states.
            delta_sigma: noise that the step removes.
        """
        grown, share = jnp.exp(delta_sigma)[:, None], -jnp.expm1(-delta_sigma)[:, None] / self.num_states
        taken = jnp.expm1(delta_sigma)[:, None] * (total + 1) / self.num_states
        return scores.Jump(
            stay=(grown - taken) * (1 / grown + share),
            slope=jnp.broadcast_to(grown * share, xt.shape),
            offset=-taken * share,
        )

    def denoise_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> scores.Jump:
        """The last Tweedie step, to sigma = 0 (theorem 4.1)."""
        return self.tweedie_jump(total, xt, sigma)._replace(is_clean=jnp.ones(xt.shape, bool))

    def score_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Score entropy per position (equation 10), for every sigma > 0 that float32 holds.

        Let a = e^sigma - 1 and r = a / (a + N). The true ratios are r where xt = x0; elsewhere they are 1/r at x0 and 1
        at all other tokens. The published program computes r as 1 - N / (a + N), which is 0 in float32 for small sigma;
        here no difference is formed.
        """
        a, n = jnp.expm1(sigma)[:, None], self.num_states
        log_r = jnp.log(a) - jnp.log(a + n)
        r = jnp.exp(log_r)
        others = jnp.exp(summary.logsumexp) / n
        unmoved = others - r * summary.mean + (n - 1) / n * r * (log_r - 1)
        # The two large terms, -log s_x0 / a and -log r / a, are added before the division by a, which may be small.
        moved = others - summary.mean - (summary.at_x0 + log_r + 1) / a - (log_r + 1) / n - (n - 2) / n
        return jnp.where(xt == x0, unmoved, moved)

    def cross_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """`score_entropy` itself: the true ratios have no known sum to which the score could be rescaled."""
        return self.score_entropy(summary, sigma, xt, x0)

    def limit_divergence(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """The prior term: KL divergence of p(xt | x0) from the distribution of the start, in nats per token.

        The start is uniform. With e = e^-sigma, N p(xt | x0) is 1 + (N - 1) e where xt = x0, and 1 - e elsewhere.
        """
        n, e = self.num_states, jnp.exp(-sigma)
        same, other = (n - 1) * e, -e
        return ((1 + same) * jnp.log1p(same) + (n - 1) * (1 + other) * jnp.log1p(other)) / n

    def reconstruction(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """The reconstruction term, in nats per position: an upper bound on -log p(`denoise_jump` gives x0).

        The weights sum to 1, but those below 0 count as 0. So the sum of the weights that count is more than 1, and
        probabilities are divided by it; here by its largest possible value. Infinite where x0 has no weight.
        """
        total = jnp.exp(summary.logsumexp)
        jump = self.denoise_jump(total, xt, sigma)
        assert jump.offset is not None
        weight = jnp.where(xt == x0, jump.stay, jump.slope * jnp.exp(summary.at_x0) + jump.offset)
        most = 1 + jnp.maximum(-jump.stay, 0) - (self.num_states - 1) * jump.offset
        return jnp.log(most) - jnp.log(jnp.maximum(weight, 0.0))

    def step_bound(
        self,
        summary: scores.ScoreSummary,
        sigma: Float[Array, "B"],
        after: Float[Array, "B"],
        xt: Int[Array, "B L"],
        x0: Int[Array, "B L"],
    ) -> Float[Array, "B L"]:
        """See `graphs.Graph.step_bound`. Rates are constant over a step: a token stays with probability exp(-sum)."""
        n = self.num_states
        moved = lambda noise: -jnp.expm1(-noise)[:, None]  # The probability that a token is replaced by any of all n.
        step, start = moved(sigma - after), moved(after)
        other, same = lambda p: p / n, lambda p: 1 - p + p / n
        is_same = xt == x0
        # q at xt, at x0 (if another token), and at each other token: proportional to p(xt | y) p(y | x0).
        evidence = jnp.where(is_same, same(moved(sigma)), other(moved(sigma)))
        at_xt = same(step) * jnp.where(is_same, same(start), other(start)) / evidence
        at_x0 = jnp.where(is_same, 0.0, other(step) * same(start) / evidence)
        at_rest, num_rest = other(step) * other(start) / evidence, n - 2 + is_same
        total = jnp.exp(summary.logsumexp)
        jumps = self.reverse_rate(xt) * (sigma - after)[:, None] * total
        log_share = jnp.log(-jnp.expm1(-jumps)) - summary.logsumexp
        of_rest = summary.mean * n - summary.at_x0  # Log score is 0 at xt.
        return (
            _entropy_term(at_xt)
            + at_xt * jumps
            + _entropy_term(at_x0)
            - at_x0 * (log_share + summary.at_x0)
            + num_rest * _entropy_term(at_rest)
            - at_rest * (num_rest * log_share + of_rest)
        )

    def is_noise(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Positions that carry loss: all."""
        return jnp.ones_like(xt, dtype=bool)


def _entropy_term(p: Float[Array, "B L"]) -> Float[Array, "B L"]:
    return p * jnp.log(jnp.where(p > 0, p, 1.0))
