"""Graphs: which token may turn into which, as closed forms (Lou et al. 2023, sections 3.3 and 4).

A graph is a rate matrix Q over `num_states` states whose columns sum to 0; p(xt | x0) is column x0 of exp(sigma Q).
Every function works position by position. Tokens are [B, L], sigma is [B] (one noise level per sequence), scores are
[B, L, V]. `score[..., y]` is p(y) / p(xt), so it is 1 at the current token.

A new graph is a class with these methods in a file of its own, and a line in `GRAPHS`.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import absorbing, scores, uniform


@runtime_checkable
class Graph(Protocol):
    """The interface of a graph, for the loss, the samplers and the programs around them.

    Attributes:
        meaning: what the graph is, for help texts and model cards.
        has_mask: whether one state is the mask; then only masks are noise.
        has_cross_entropy: whether `cross_entropy` is a tighter bound than `score_entropy`.
        scales_by_sigma: whether the network's output may be divided by (e^sigma - 1) N. This needs true ratios out of
            noise that sum to 1 / (e^sigma - 1).
        mixes_uniformly: whether noise redraws a token with probability 1 - e^-sigma from all N. Then a distribution of
            the clean token given all other positions has a score (`networks.NetworkConfig.normalize`).
    """

    meaning: ClassVar[str]
    has_mask: ClassVar[bool]
    has_cross_entropy: ClassVar[bool]
    scales_by_sigma: ClassVar[bool]
    mixes_uniformly: ClassVar[bool]

    @classmethod
    def from_tokenizer(cls, vocab_size: int, mask_id: int | None) -> "Graph":
        """The graph over a tokenizer's tokens; `mask_id` is the tokenizer's own mask token, None if it has none."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number N of real tokens."""
        ...

    @property
    def num_states(self) -> int:
        """Number V of states: the tokens, and the mask if there is one."""
        ...

    @property
    def mask_id(self) -> int | None:
        """Id of the mask; None if there is none."""
        ...

    def sample_transition(
        self, key: Key[Array, ""], x0: Int[Array, "B L"], sigma: Float[Array, "B"], *, paired: bool = False
    ) -> Int[Array, "B L"]:
        """Draws xt given x0, after total noise sigma; if `paired`, with opposite noise in sequences 2i and 2i + 1."""
        ...

    def sample_limit(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "B L"]:
        """Draws from the limit of infinite noise, with which generation starts."""
        ...

    def is_noise(self, xt: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Positions that carry loss and may change in a reverse step."""
        ...

    def reverse_rate(self, xt: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Q(xt, y) for y != xt. Times score_y it is the rate of the reverse process from xt to y (definition 3.5)."""
        ...

    def leap_time(self, sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The time scale on which a second-order sampler's two leaps are equally long, as a function of the noise."""
        ...

    def sigma_at(self, leap_time: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The noise at a `leap_time`."""
        ...

    def leap_rate(self, xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L"]:
        """`reverse_rate` per unit of `leap_time`."""
        ...

    def tweedie_jump(
        self, total: Float[Array, "B L"], xt: Int[Array, "B L"], delta_sigma: Float[Array, "B"]
    ) -> scores.Jump:
        """The Tweedie step (equation 19) that removes `delta_sigma`; `total` is the sum of the score over y != xt."""
        ...

    def denoise_jump(self, total: Float[Array, "B L"], xt: Int[Array, "B L"], sigma: Float[Array, "B"]) -> scores.Jump:
        """The last Tweedie step, to sigma = 0 (theorem 4.1)."""
        ...

    def score_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """Score entropy per position (equation 10)."""
        ...

    def cross_entropy(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """The tighter bound at the same noise, per position; `score_entropy` if none is known."""
        ...

    def limit_divergence(self, sigma: Float[Array, ""]) -> Float[Array, ""]:
        """KL divergence of p(xt | x0) from the distribution that generation starts with, in nats per token."""
        ...

    def reconstruction(
        self, summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """-log of the probability that `denoise_jump` gives x0, in nats per position."""
        ...

    def step_bound(
        self,
        summary: scores.ScoreSummary,
        sigma: Float[Array, "B"],
        after: Float[Array, "B"],
        xt: Int[Array, "B L"],
        x0: Int[Array, "B L"],
    ) -> Float[Array, "B L"]:
        """The term of one reverse step in the bound on -log p(x0), in nats per position.

        It is the KL divergence of q(xs | xt, x0), which knows x0, from the distribution of the step (Sohl-Dickstein et
        al. 2015, equation 14). The sum over the steps of a sampler bounds its -log p(x0). A longer step costs more,
        since it changes positions independently of each other. Each term depends only on its two times.

        Args:
            summary: summary of the score at xt.
            sigma: total noise of xt.
            after: total noise after the step.
            xt: noised tokens.
            x0: clean tokens.
        """
        ...


GRAPHS: dict[str, type[Graph]] = {"absorb": absorbing.Absorbing, "uniform": uniform.Uniform}
# So that they also have the names `graphs.Absorbing` and `graphs.Uniform`.
Absorbing = absorbing.Absorbing
Uniform = uniform.Uniform
