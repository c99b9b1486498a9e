"""The autoregressive baseline: the same network with causal attention predicts each token from those before it.

Its input is the sequence shifted right by one position, with the mask of the absorbing graph in front. sigma is 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, losses, scores
from sedd_jax.model import networks, score_heads, score_losses
from sedd_jax.reverse import steps
from sedd_jax.runtime import errors


def log_likelihood(model: networks.Model, x0: Int[Array, "B L"], graph: graphs.Graph) -> Float[Array, "B L"]:
    """log p(x0_l | x0_1, ..., x0_{l-1}) of every token, in nats."""
    masks = _masks(x0, graph)
    inputs, sigma = _inputs(x0, masks)
    found = networks.apply(model, inputs, sigma)
    summary = score_heads.summarize(model, found, masks, x0, sigma, jnp.ones_like(x0, bool))
    return summary.at_x0 - summary.logsumexp


def mean_bounds(
    model: networks.Model, x0: Int[Array, "B L"], graph: graphs.Graph, dropout_key: Key[Array, ""] | None = None
) -> score_losses.Total:
    """-log p(x0) in nats, the mean over sequences, as both bounds; see `objectives.mean_bounds`."""
    masks = _masks(x0, graph)
    inputs, sigma = _inputs(x0, masks)
    found = networks.apply(model, inputs, sigma, dropout_key)
    predicted = losses.Noised(xt=masks, x0=x0, sigma=sigma, weights=jnp.full(len(x0), 1 / len(x0)))
    return score_losses.total(model, found, predicted, jnp.ones_like(x0, bool), _surprise)


def _surprise(
    summary: scores.ScoreSummary, sigma: Float[Array, "B"], xt: Int[Array, "B L"], x0: Int[Array, "B L"]
) -> losses.Bounds:
    del sigma, xt, x0  # The summary is all that a cross-entropy needs.
    return losses.Bounds(*(summary.logsumexp - summary.at_x0,) * 2)


def features(model: networks.Model, x0: Int[Array, "B L"], graph: graphs.Graph) -> Float[Array, "B L D"]:
    """Features [B, L, D] at each position after its token has been read.

    The last token is never an input of the network, so the last two positions have the same features.
    """
    inputs, sigma = _inputs(x0, _masks(x0, graph))
    found = networks.apply(model, inputs, sigma)
    return jnp.concatenate([found[:, 1:], found[:, -1:]], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftToRight:
    """The `samplers.Sampler` of the baseline: iteration i draws the token at position i, given those before.

    It is not in `samplers.SAMPLERS`, since only the baseline can use it.

    Attributes:
        length: number of tokens L.
        traits: what the sampler is, needs and supports.
        corrector_steps: always 0.
    """

    length: int
    traits: steps.Traits = steps.Traits(
        meaning="one token after the other", needs_mask=True, takes_grid=False, takes_guidance=False
    )
    corrector_steps: int = 0

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """L - 1, whatever is asked for: one step for every token but the last."""
        del num_steps, num_gaps
        return self.length - 1

    def begin(self, key: Key[Array, ""], process: forward.Process, given: steps.Given) -> None:
        """Nothing is drawn beforehand."""

    def take(
        self,
        key: Key[Array, ""],
        iteration: Int[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
        is_last: Bool[Array, "B"] | None = None,
    ) -> Int[Array, "B L"]:
        """Draws one token of each sequence: the position is the number of iterations that the sequence has taken."""
        del is_last  # The last token is drawn like all others.
        return _draw(jax.random.fold_in(key, iteration), draws, process.graph, batch, batch.iteration)

    def finish(
        self,
        key: Key[Array, ""],
        key_last: Key[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
    ) -> Int[Array, "B L"]:
        """Draws the last token."""
        del key  # `take` folds positions into it.
        last = self.length - 1
        position = jnp.full_like(batch.iteration, last)
        return _draw(jax.random.fold_in(key_last, last), draws, process.graph, batch, position)


def _draw(
    key: Key[Array, ""], draws: steps.Draws, graph: graphs.Graph, batch: steps.Batch, position: Int[Array, "B"]
) -> Int[Array, "B L"]:
    """xt with the token at `position` of each sequence drawn; known tokens are kept."""
    x = batch.given.clamp(batch.xt)
    masks = _masks(x, graph)
    inputs, sigma = _inputs(x, masks)
    is_next = (jnp.arange(x.shape[1])[None] == position[:, None]) & ~batch.given.is_given
    jump = lambda total: graph.denoise_jump(total, masks, sigma)
    return jnp.where(is_next, draws.draw_fn(key, draws.evaluate_fn(inputs, sigma), masks, is_next, jump), x)


def refuse_text_after_gaps(is_given: Bool[np.ndarray, "*B L"]) -> None:
    """Raises errors.UserError where known tokens follow a gap: the baseline would fill the gap without seeing them."""
    if (np.diff(is_given.astype(np.int8), axis=-1) > 0).any():
        raise errors.UserError(
            "an autoregressive run sees no text after a gap",
            remedy=f"give text at the start only, as {errors.name('prefix')} does",
        )


def _masks(x: Int[Array, "B L"], graph: graphs.Graph) -> Int[Array, "B L"]:
    assert graph.mask_id is not None
    return jnp.full_like(x, graph.mask_id)


def _inputs(x: Int[Array, "B L"], masks: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    return jnp.concatenate([masks[:, :1], x[:, :-1]], axis=1), jnp.zeros(len(x))
