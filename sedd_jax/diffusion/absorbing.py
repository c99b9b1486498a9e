"""The absorbing graph: every token turns into the mask and stays there (Lou et al. 2023, equation 16)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import pairs, scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorbing:
    """Every token turns into the mask at rate 1 and stays there (equation 16).

    Attributes:
        vocab_size: number N of real tokens.
        mask_id: id of the mask, any of 0..N.
    """

    meaning: ClassVar[str] = "tokens turn into the mask"
    has_mask: ClassVar[bool] = True
    has_cross_entropy: ClassVar[bool] = True
    scales_by_sigma: ClassVar[bool] = True
    mixes_uniformly: ClassVar[bool] = False

    vocab_size: int
    mask_id: int

    @classmethod
    def from_tokenizer(cls, vocab_size: int, mask_id: int | None) -> "Absorbing":
        """The graph over a tokenizer's tokens. If these include no mask, the mask is the id after the last token."""
        return cls(vocab_size=vocab_size, mask_id=vocab_size if mask_id is None else mask_id)

    @property
    def num_states(self) -> int:
        return self.vocab_size + 1

    def rate_column(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Column x of Q: the rates out of x."""
        return self._one_hot(jnp.full_like(x, self.mask_id)) - self._one_hot(x)

    def rate_row(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Row x of Q: the rates into x."""
        return jnp.where((x == self.mask_id)[..., None], 1.0, 0.0) - self._one_hot(x)

    def transition_column(self, x0: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every xt: column x0 of exp(sigma Q)."""
        sigma = sigma[:, None, None]
        mask = self._one_hot(jnp.full_like(x0, self.mask_id))
        return jnp.exp(-sigma) * self._one_hot(x0) - jnp.expm1(-sigma) * mask

    def transition_row(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every x0: row xt of exp(sigma Q)."""
        sigma = sigma[:, None, None]
        into_mask = jnp.where((xt == self.mask_id)[..., None], -jnp.expm1(-sigma), 0.0)
        return jnp.exp(-sigma) * self._one_hot(xt) + into_mask

    def sample_transition(
        self, key: Key[Array, ""], x0: Int[Array, "B L"], sigma: Float[Array, "B"], *, paired: bool = False
    ) -> Int[Array, "B L"]:
        """Draws xt given x0: each token becomes the mask with probability 1 - e^-sigma."""
        move = pairs.uniform(key, x0.shape, paired) < -jnp.expm1(-sigma)[:, None]
        return jnp.where(move, self.mask_id, x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "B L"]:
        """Draws from the limit of infinite noise: all masks."""
        del key  # The limit is a single state.
        return jnp.full(shape, self.mask_id, dtype=jnp.int32)

    def reverse_rate(self, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Q(xt, y) for y != xt. Times score_y it is the rate of the reverse process from xt to y (definition 3.5)."""
        return jnp.where(self.is_noise(xt), 1.0, 0.0)

    def leap_time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time scale on which the reverse process leaves each mask at rate 1: log of the probability of a mask."""
        return _log_complement(sigma)

    def sigma_at(self, leap_time: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The noise at a `leap_time`."""
        return -_log_complement(-leap_time)

    def leap_rate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L"]:
        """Factor of score_y in the rate from xt to y != xt, per unit of `leap_time`: e^sigma - 1 from the mask."""
        return jnp.where(self.is_noise(xt), jnp.expm1(sigma)[:, None], 0.0)

    def tweedie_jump(
        self, total: Float[Array, "B L"], xt: Int[Array, "B L"], delta_sigma: Float[Array, "B"]
    ) -> scores.Jump:
        """The Tweedie step, weights [exp(-dQ) score]_y exp(dQ)(xt, y), d = delta_sigma (equation 19).

        From the mask, a token y has weight (e^d - 1) score_y, and the mask has the rest of 1. A token that is not the
        mask stays. If the network is imperfect, the weights of tokens may sum to more than 1; then that of the mask is
        negative.

        Args:
            total: sum of the score over all y != xt.
            xt: current states.
            delta_sigma: noise that the step removes.
        """
        growth = jnp.where(self.is_noise(xt), jnp.expm1(delta_sigma)[:, None], 0.0)
        return scores.Jump(stay=1 - growth * total, slope=growth)

    def denoise_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> scores.Jump:
        """The last Tweedie step, to sigma = 0 (theorem 4.1); no outcome is the mask."""
        del total, sigma  # The weights of tokens are proportional to the score, whatever the noise.
        masked = self.is_noise(xt)
        return scores.Jump(stay=jnp.where(masked, 0.0, 1.0), slope=jnp.where(masked, 1.0, 0.0))

    def score_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Score entropy per position (equation 10), 0 where xt is not the mask.

        With a = e^sigma - 1, the true ratio of x0 to the mask is 1/a, and that of any other token is 0. So it is
        sum_y s_y - (1/a) log s_x0 + (1/a)(log(1/a) - 1).
        """
        a = jnp.expm1(sigma)[:, None]
        masked = self.is_noise(xt)
        excess = summary.at_x0 + jnp.log(a)
        value = jnp.exp(jnp.where(masked, summary.logsumexp, 0.0)) - (jnp.where(masked, excess, 0.0) + 1) / a
        return jnp.where(masked, value, 0.0)

    def cross_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """The tighter bound at the same noise: (1/a) CE(softmax of log score, x0); 0 where xt is not the mask.

        The true ratios out of the mask sum to 1/a, a = e^sigma - 1. So rescaling the score to that sum can only lower
        score entropy, and the result is a cross-entropy.
        """
        del x0  # `summary.at_x0` holds what is needed of it.
        return self._surprise(summary, xt) / jnp.expm1(sigma)[:, None]

    def limit_divergence(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """The prior term: KL divergence of p(xt | x0) from the distribution of the start, in nats per token.

        It is e^-sigma log N. A token is still unmasked with probability e^-sigma. To keep the divergence finite, the
        start is taken to be the mask with probability 1 - e^-sigma, and otherwise a uniform token.
        """
        return jnp.exp(-sigma) * jnp.log(self.vocab_size)

    def reconstruction(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """The reconstruction term, in nats per position: -log of the probability that `denoise_jump` gives x0."""
        del sigma, x0
        return self._surprise(summary, xt)

    def _surprise(self, summary: scores.ScoreSummary, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Cross-entropy of the softmax of log score and x0 at masks, 0 elsewhere."""
        return jnp.where(self.is_noise(xt), summary.logsumexp - summary.at_x0, 0.0)

    def step_bound(
        self,
        summary: scores.ScoreSummary,
        sigma: Float[Array, "B"],
        after: Float[Array, "B"],
        xt: Int[Array, "B L"],
        x0: Int[Array, "B L"],
    ) -> Float[Array, "B L"]:
        """See `graphs.Graph.step_bound`. Steps leave masks at the true rate, to tokens in proportion to the score."""
        leaves = jnp.exp(-after) * jnp.expm1(after - sigma) / jnp.expm1(-sigma)
        return leaves[:, None] * self.reconstruction(summary, sigma, xt, x0)

    def is_noise(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Positions that carry loss: the masks."""
        return xt == self.mask_id

    def _one_hot(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        return jax.nn.one_hot(x, self.num_states)


def _log_complement(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log(1 - e^-x), precise for small and for large x > 0, where 1 - e^-x is 1 in float32."""
    is_large = x > math.log(2)
    small, large = jnp.where(is_large, 1.0, x), jnp.where(is_large, x, 1.0)
    return jnp.where(is_large, jnp.log1p(-jnp.exp(-large)), jnp.log(-jnp.expm1(-small)))
