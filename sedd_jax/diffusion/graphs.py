"""Graphs: which token may turn into which, as closed forms (Lou et al. 2023, sections 3.3 and 4).

A graph is a rate matrix Q over `num_states` states whose columns sum to 0; p(xt | x0) is column x0 of exp(sigma Q).
Every function works position by position: tokens are [B, L], sigma is [B] (one noise level a sequence), scores are [B,
L, V]. `score[..., y]` is p(y) / p(xt), so it is 1 at the current token.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class ScoreSummary(NamedTuple):
    """The three numbers per position that score entropy needs, so that nothing of shape [B, L, V] has to exist.

    Attributes:
        logsumexp: log of the sum of the score over all y != xt.
        mean: mean over all V states of log score, the current token counting 0.
        at_x0: log score of the clean token.
    """

    logsumexp: Float[Array, "B L"]
    mean: Float[Array, "B L"]
    at_x0: Float[Array, "B L"]


def summarize(log_score: Float[Array, "B L V"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]) -> ScoreSummary:
    """Computes a `ScoreSummary` from the whole array, for vocabularies small enough to hold it."""
    current = _is_state(xt, log_score.shape[-1])
    others = jnp.where(current, -jnp.inf, log_score)
    return ScoreSummary(
        logsumexp=jax.nn.logsumexp(others, axis=-1),
        mean=jnp.where(current, 0.0, log_score).sum(-1) / log_score.shape[-1],
        at_x0=jnp.take_along_axis(log_score, x0[..., None], axis=-1)[..., 0],
    )


class Jump(NamedTuple):
    """The law of every position's next state, without its array over states: what a reverse step draws from.

    xt has the weight `stay`, any other y the weight slope score_y + offset; negative weights count as 0.

    Attributes:
        stay: weight of xt.
        slope: factor of the score.
        offset: what is added to it; None where it is 0 everywhere.
    """

    stay: Float[Array, "B L"]
    slope: Float[Array, "B L"]
    offset: Float[Array, "B L"] | None = None

    def weights(self, score: Float[Array, "B L V"], xt: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """The whole array of weights, for vocabularies small enough to hold it."""
        offset = 0.0 if self.offset is None else self.offset[..., None]
        moved = self.slope[..., None] * score + offset
        return jnp.where(_is_state(xt, score.shape[-1]), self.stay[..., None], moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorbing:
    """Every token turns into the mask at rate 1 and stays there (equation 16).

    Attributes:
        vocab_size: number N of real tokens.
        mask_id: id of the mask, anywhere in 0..N.
    """

    vocab_size: int
    mask_id: int

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
        self, key: Key[Array, ""], x0: Int[Array, "B L"], sigma: Float[Array, "B"]
    ) -> Int[Array, "B L"]:
        """Draws xt given x0: each token becomes the mask with probability 1 - e^-sigma."""
        move = jax.random.uniform(key, x0.shape) < -jnp.expm1(-sigma)[:, None]
        return jnp.where(move, self.mask_id, x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "B L"]:
        """Draws from the limit of infinite noise: all masks."""
        del key  # The limit is a single state.
        return jnp.full(shape, self.mask_id, dtype=jnp.int32)

    def reverse_rate(self, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Q(xt, y) for any y != xt: times score_y, the rate of the reverse process from xt to y (definition 3.5)."""
        return jnp.where(self.is_noise(xt), 1.0, 0.0)

    def leap_time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time in which the reverse process leaves each mask at rate 1: log of the probability of a mask."""
        return jnp.log(-jnp.expm1(-sigma))

    def sigma_at(self, leap_time: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The noise at a `leap_time`."""
        return -jnp.log1p(-jnp.exp(leap_time))

    def leap_rate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L"]:
        """Times score_y, the rate from xt to y != xt in `leap_time`: e^sigma - 1 from the mask."""
        return jnp.where(self.is_noise(xt), jnp.expm1(sigma)[:, None], 0.0)

    def tweedie_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], delta_sigma: Float[Array, "B"]) -> Jump:
        """The Tweedie step, weights [exp(-dQ) score]_y exp(dQ)(xt, y), d = delta_sigma (equation 19).

        From the mask, y gets (e^d - 1) score_y and the mask what is left of 1; a token that is not the mask stays. The
        weight of the mask is negative where an imperfect network promises more than there is.

        Args:
            total: sum of the score over all y != xt.
            xt: current states.
            delta_sigma: noise removed by the step.
        """
        growth = jnp.where(self.is_noise(xt), jnp.expm1(delta_sigma)[:, None], 0.0)
        return Jump(stay=1 - growth * total, slope=growth)

    def denoise_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Jump:
        """The last Tweedie step, to sigma = 0 (theorem 4.1), with no mask among the outcomes."""
        del total, sigma  # Among tokens the weights are in proportion to the score, whatever the noise.
        masked = self.is_noise(xt)
        return Jump(stay=jnp.where(masked, 0.0, 1.0), slope=jnp.where(masked, 1.0, 0.0))

    def score_entropy(
        self, summary: ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Score entropy per position (equation 10), 0 where xt is not the mask.

        With a = e^sigma - 1 the true ratio of x0 to the mask is 1/a and that of any other token 0:
        sum_y s_y - (1/a) log s_x0 + (1/a)(log(1/a) - 1).
        """
        a = jnp.expm1(sigma)[:, None]
        masked = self.is_noise(xt)
        excess = summary.at_x0 + jnp.log(a)
        value = jnp.exp(jnp.where(masked, summary.logsumexp, 0.0)) - (jnp.where(masked, excess, 0.0) + 1) / a
        return jnp.where(masked, value, 0.0)

    def cross_entropy(
        self, summary: ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """The tighter bound at the same noise: (1/a) CE(softmax of log score, x0), 0 where xt is not the mask.

        The true ratios out of the mask sum to 1/a, so rescaling the score to that sum can only lower score entropy;
        what is left is a cross-entropy.
        """
        return self._surprise(summary, xt) / jnp.expm1(sigma)[:, None]

    def limit_divergence(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """KL divergence of p(xt | x0) from the law that generation starts with, in nats a token: the prior term.

        A token is still there with probability e^-sigma. So that it may be, the start is taken to be the mask with
        probability 1 - e^-sigma and else any token, evenly; that is e^-sigma log N.
        """
        return jnp.exp(-sigma) * jnp.log(self.vocab_size)

    def reconstruction(
        self, summary: ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """-log of the probability that `denoise_jump` gives x0: the reconstruction term, in nats per position."""
        del sigma, x0
        return self._surprise(summary, xt)

    def _surprise(self, summary: ScoreSummary, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Cross-entropy of the softmax of log score and x0 at masks, 0 elsewhere."""
        return jnp.where(self.is_noise(xt), summary.logsumexp - summary.at_x0, 0.0)

    def is_noise(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Where a position carries loss: at the masks."""
        return xt == self.mask_id

    def _one_hot(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        return jax.nn.one_hot(x, self.num_states)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every token turns into every token at rate 1/N: Q = 1/N - identity (equation 15, divided by N).

    Attributes:
        vocab_size: number N of real tokens, all of the states.
    """

    vocab_size: int

    @property
    def num_states(self) -> int:
        return self.vocab_size

    def rate_column(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Column x of Q: the rates out of x."""
        return jnp.where(_is_state(x, self.num_states), 1 / self.num_states - 1, 1 / self.num_states)

    def rate_row(self, x: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Row x of Q: the rates into x. Q is symmetric."""
        return self.rate_column(x)

    def transition_column(self, x0: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every xt: column x0 of exp(sigma Q)."""
        redraw_prob = -jnp.expm1(-sigma)[:, None, None]
        stay = 1 - redraw_prob * ((self.num_states - 1) / self.num_states)
        return jnp.where(_is_state(x0, self.num_states), stay, redraw_prob / self.num_states)

    def transition_row(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        """p(xt | x0) for every x0: row xt of exp(sigma Q), which is symmetric."""
        return self.transition_column(xt, sigma)

    def sample_transition(
        self, key: Key[Array, ""], x0: Int[Array, "B L"], sigma: Float[Array, "B"]
    ) -> Int[Array, "B L"]:
        """Draws xt given x0: with probability 1 - e^-sigma a token is redrawn from all N, itself included."""
        key_move, key_token = jax.random.split(key)
        move = jax.random.uniform(key_move, x0.shape) < -jnp.expm1(-sigma)[:, None]
        return jnp.where(move, jax.random.randint(key_token, x0.shape, 0, self.num_states, x0.dtype), x0)

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "B L"]:
        """Draws from the limit of infinite noise: uniform tokens."""
        return jax.random.randint(key, shape, 0, self.num_states, jnp.int32)

    def reverse_rate(self, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Q(xt, y) for any y != xt: times score_y, the rate of the reverse process from xt to y (definition 3.5)."""
        return jnp.full(xt.shape, 1 / self.num_states)

    def leap_time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time in which every token turns into every other at rate 1/N: sigma itself."""
        return sigma

    def sigma_at(self, leap_time: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The noise at a `leap_time`."""
        return leap_time

    def leap_rate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L"]:
        """Times score_y, the rate from xt to y != xt in `leap_time`."""
        del sigma
        return self.reverse_rate(xt)

    def tweedie_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], delta_sigma: Float[Array, "B"]) -> Jump:
        """The Tweedie step, weights [exp(-dQ) score]_y exp(dQ)(xt, y), d = delta_sigma (equation 19).

        Errors of the score are multiplied by e^d: where one step removes much noise (few steps of a geometric schedule
        with sigma_max = 20) the weights are mostly error, as in the published program. Take more steps, or `euler`.

        Args:
            total: sum of the score over all y != xt.
            xt: current states.
            delta_sigma: noise removed by the step.
        """
        grown, share = jnp.exp(delta_sigma)[:, None], -jnp.expm1(-delta_sigma)[:, None] / self.num_states
        taken = jnp.expm1(delta_sigma)[:, None] * (total + 1) / self.num_states
        return Jump(
            stay=(grown - taken) * (1 / grown + share),
            slope=jnp.broadcast_to(grown * share, xt.shape),
            offset=-taken * share,
        )

    def denoise_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Jump:
        """The last Tweedie step, to sigma = 0 (theorem 4.1)."""
        return self.tweedie_jump(total, xt, sigma)

    def score_entropy(
        self, summary: ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Score entropy per position (equation 10), for every sigma > 0 that float32 holds.

        With a = e^sigma - 1 and r = a / (a + N): where xt = x0 the true ratios are r, elsewhere 1/r at x0 and 1 at the
        rest. Published as 1 - N / (a + N), r is 0 in float32 for small sigma; here it is never formed by a difference.
        """
        a, n = jnp.expm1(sigma)[:, None], self.num_states
        log_r = jnp.log(a) - jnp.log(a + n)
        r = jnp.exp(log_r)
        others = jnp.exp(summary.logsumexp) / n
        unmoved = others - r * summary.mean + (n - 1) / n * r * (log_r - 1)
        # The two large terms, -log s_x0 / a and -log r / a, are joined before they are divided by a small a.
        moved = others - summary.mean - (summary.at_x0 + log_r + 1) / a - (log_r + 1) / n - (n - 2) / n
        return jnp.where(xt == x0, unmoved, moved)

    def limit_divergence(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """KL divergence of p(xt | x0) from the law that generation starts with, in nats a token: the prior term.

        That is uniform. With e = e^-sigma, p N is 1 + (N - 1) e where xt = x0 and 1 - e elsewhere.
        """
        n, e = self.num_states, jnp.exp(-sigma)
        same, other = (n - 1) * e, -e
        return ((1 + same) * jnp.log1p(same) + (n - 1) * (1 + other) * jnp.log1p(other)) / n

    def reconstruction(
        self, summary: ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """-log of the probability that `denoise_jump` gives x0, or a little more: the reconstruction term, in nats.

        The weights add up to 1, but those below 0 count as 0, so that the probability is divided by 1 and what they
        would take away; here by the most that this can be. Infinite where x0 itself has no weight.
        """
        total = jnp.exp(summary.logsumexp)
        jump = self.denoise_jump(total, xt, sigma)
        assert jump.offset is not None
        weight = jnp.where(xt == x0, jump.stay, jump.slope * jnp.exp(summary.at_x0) + jump.offset)
        most = 1 + jnp.maximum(-jump.stay, 0) - (self.num_states - 1) * jump.offset
        return jnp.log(most) - jnp.log(jnp.maximum(weight, 0.0))

    def is_noise(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Where a position carries loss: everywhere."""
        return jnp.ones_like(xt, dtype=bool)


def _is_state(x: Int[Array, "B L"], num_states: int) -> Bool[Array, "B L V"]:
    return x[..., None] == jnp.arange(num_states)[None, None]


Graph = Absorbing | Uniform
GRAPHS = {"absorb": Absorbing, "uniform": Uniform}
