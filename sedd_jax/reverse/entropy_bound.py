"""The entropy-bounded sampler (Ben-Hamu et al. 2025, arXiv 2505.24857): the surest masks of an absorbing graph first.

Tokens that one evaluation fills are drawn independently. How far that is from drawing them jointly, as a KL divergence,
is at most the sum of their entropies less the largest of these. So masks are filled in the order of their entropy, as
many at once as a share of that bound allows. Where text is sure, one evaluation fills many.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward
from sedd_jax.reverse import steps, time_grids

_LAST = 2**31 - 1  # Number of the last evaluation; no iteration has it.
_SLACK = 1e-5  # of the bound: sums of float32 are not exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """Fills masks in the order of their entropy; each evaluation may spend an equal share of the bound that is left.

    The paper has the same bound, but keeps it constant; here the number of evaluations is at most the one asked for.
    Samples are biased where an evaluation fills several masks, and where the network's distributions at different
    positions do not agree: then the order changes the result.

    The noise that the network gets follows from the share of masks that is left. A corrector step masks as many filled
    tokens, chosen uniformly, as a step has filled on average, and draws these again.

    Attributes:
        traits: what the sampler is, needs and supports.
        corrector_steps: corrector steps after each step.
    """

    traits: steps.Traits
    corrector_steps: int = 0

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """Steps before the last evaluation: at most as many as asked for, and no more evaluations than gaps."""
        return min(num_steps, max(0, num_gaps - 1))

    def begin(self, key: Key[Array, ""], process: forward.Process, given: steps.Given) -> Int[Array, "B"]:
        """The number of masks of each sequence. Nothing is drawn."""
        del key, process
        return (~given.is_given).sum(1)

    def take(
        self,
        key: Key[Array, ""],
        iteration: Int[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
        is_last: Bool[Array, "B"] | None = None,
    ) -> Int[Array, "B L"]:
        """Fills masks within each sequence's share of the bound; in a corrector step, draws filled tokens again."""
        del is_last  # The last evaluation has the whole of the bound that is left.
        key_back, key_tokens = jax.random.split(jax.random.fold_in(key, iteration))
        step = batch.iteration // (1 + self.corrector_steps)
        num_filled = (~batch.given.is_given & ~process.graph.is_noise(batch.xt)).sum(1)
        on_average = -(-num_filled // (step + 1))
        xt = steps.mask_again(key_back, process.graph, batch, on_average, self.corrector_steps)
        return _fill(key_tokens, draws, process, batch, xt, batch.num_steps + 1 - step, xt != batch.xt)

    def finish(
        self,
        key: Key[Array, ""],
        key_last: Key[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
    ) -> Int[Array, "B L"]:
        """Fills all masks that are left, in one evaluation."""
        del key_last  # Not needed: `_LAST` gives this evaluation a key of its own.
        own_key, xt = jax.random.fold_in(key, _LAST), batch.given.clamp(batch.xt)
        return _fill(own_key, draws, process, batch, xt, jnp.ones_like(batch.num_steps), jnp.zeros_like(xt, bool))


def _fill(
    key: Key[Array, ""],
    draws: steps.Draws,
    process: forward.Process,
    batch: steps.Batch,
    xt: Int[Array, "B L"],
    num_left: Int[Array, "B"],
    again: Bool[Array, "B L"],
) -> Int[Array, "B L"]:
    """Fills the masks of `again`; where a sequence has none, those that one of `num_left` evaluations may fill."""
    graph, noise = process.graph, process.noise
    is_mask = batch.given.is_movable(graph, xt)
    least, most = noise.sigma(jnp.float32(time_grids.T_END)), noise.sigma(jnp.float32(1.0))
    share = is_mask.sum(1) / jnp.maximum(batch.plan, 1)
    # If almost all is noise at t = 1, the probability of a mask there is 1 in float32.
    sigma = jnp.clip(-jnp.log1p(jnp.expm1(-most) * share), least, most)
    evaluation = draws.evaluate_fn(xt, sigma)
    is_next = within_bound(draws.entropy_fn(evaluation, xt, is_mask), is_mask, num_left)
    is_next = jnp.where(again.any(1, keepdims=True), again, is_next)
    return draws.draw_fn(key, evaluation, xt, is_next, lambda total: graph.denoise_jump(total, xt, sigma))


def within_bound(
    entropy: Float[Array, "B L"], is_mask: Bool[Array, "B L"], num_left: Int[Array, "B"]
) -> Bool[Array, "B L"]:
    """The masks that an evaluation fills: the surest, at least one, within an equal share of the bound.

    The bound of some masks is the sum of their entropies less the largest. Of equal entropies the left one is first.

    Args:
        entropy: entropy of each position's token, in nats.
        is_mask: which positions are masks.
        num_left: evaluations that are left to each sequence, this one included; the last one fills all.
    """
    ranked = jnp.where(is_mask, jnp.maximum(entropy, 0.0), jnp.inf)
    order = jnp.argsort(ranked, axis=1)
    rank = jnp.argsort(order, axis=1)
    of_rank = jnp.take_along_axis(jnp.where(is_mask, ranked, 0.0), order, axis=1)
    bound = jnp.cumsum(of_rank, axis=1) - of_rank
    whole = jnp.where(jnp.take_along_axis(is_mask, order, axis=1), bound, 0.0).max(1)
    allowed = jnp.where(num_left > 1, whole * (1 + _SLACK) / jnp.maximum(num_left, 1), jnp.inf)
    return is_mask & jnp.take_along_axis(bound <= allowed[:, None], rank, axis=1)
