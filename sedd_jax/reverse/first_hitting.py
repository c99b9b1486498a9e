"""The first-hitting sampler (Zheng et al. 2024, arXiv 2409.02908): absorbing diffusion without steps in time.

With n masks left, the distribution of the time at which the next one is filled is known, and its position is uniform
among them. So with one network evaluation per token, the draw is exact: from the reverse process itself, for any noise
schedule. One evaluation may also fill several masks; this is as fast as other samplers and, like them, not exact.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax.diffusion import forward, graphs
from sedd_jax.reverse import steps, time_grids

_LAST = 2**31 - 1  # Number of the last evaluation; no iteration has it.
_CLOCK, _RANK, _TOKENS, _BACK = range(4)  # Folded into a trajectory's key, one for each thing that is drawn.


class Plan(NamedTuple):
    """Order and times in which masks are filled, drawn beforehand. An evaluation reads it by the number of masks left.

    Attributes:
        num_gaps: number of masks at the start.
        rank: rank of each position; masks are filled from the highest rank down.
        sigma: `sigma[:, n - 1]` is the total noise at which the next mask is filled when n are left.
    """

    num_gaps: Int[Array, "B"]
    rank: Int[Array, "B L"]
    sigma: Float[Array, "B L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting:
    """Fills an equal share of a sequence's masks in every evaluation; shares differ by one mask at most.

    The draw is exact if each share is one mask: with at least as many evaluations as masks. Every sequence has its own
    times. A corrector step masks as many filled tokens, chosen uniformly, and fills them again. For one token this is a
    Gibbs step, which keeps the distribution of the sequence.

    Attributes:
        traits: what the sampler is, needs and supports.
        corrector_steps: corrector steps after each step.
    """

    traits: steps.Traits
    corrector_steps: int = 0

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """Steps before the last evaluation: as many as asked for, but no more evaluations than gaps."""
        return min(num_steps, max(0, num_gaps - 1))

    def begin(self, key: Key[Array, ""], process: forward.Process, given: steps.Given) -> Plan:
        """Draws the order and the times in which the masks of each sequence are filled.

        If n masks are left when a token is masked with probability m, the next one is filled when that probability is
        m u^(1/n), with u uniform in [0, 1].
        """
        key_clock, key_rank = _part(key, _CLOCK), _part(key, _RANK)
        shape, noise = given.tokens.shape, process.noise
        num_gaps = (~given.is_given).sum(1)
        # Ranks, since among so many float32 uniforms two are often equal.
        rank = jnp.argsort(jnp.argsort(jax.random.uniform(key_rank, shape), axis=1), axis=1)
        count = jnp.arange(1, shape[1] + 1)[None]
        log_decay = jnp.where(count <= num_gaps[:, None], -jax.random.exponential(key_clock, shape) / count, 0.0)
        start = jnp.log(-jnp.expm1(-noise.sigma(jnp.float32(1.0))))
        log_mask_prob = start + jnp.cumsum(log_decay[:, ::-1], axis=1)[:, ::-1]
        least, most = noise.sigma(jnp.float32(time_grids.T_END)), noise.sigma(jnp.float32(1.0))
        # If almost all is noise at t = 1, the probability of a mask may be 1 in float32.
        sigma = jnp.clip(-jnp.log1p(-jnp.exp(log_mask_prob)), least, most)
        return Plan(num_gaps, rank, sigma)

    def take(
        self,
        key: Key[Array, ""],
        iteration: Int[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
        is_last: Bool[Array, "B"] | None = None,
    ) -> Int[Array, "B L"]:
        """Fills the next share of each sequence's masks; in a corrector step, draws as many filled tokens again."""
        del is_last  # The last evaluation fills a share like all others.
        num_gaps, repeats = batch.plan.num_gaps, 1 + self.corrector_steps
        # No evaluation may have an empty share: with fewer masks than evaluations, each mask gets one.
        evaluations = jnp.clip(num_gaps, 1, batch.num_steps + 1)
        filled_before = lambda step: step * num_gaps // evaluations
        step = batch.iteration // repeats
        share = filled_before(step + 1) - filled_before(step)
        key_back = jax.random.fold_in(_part(key, _BACK), iteration)
        xt = steps.mask_again(key_back, process.graph, batch, share, self.corrector_steps)
        return _fill(jax.random.fold_in(_part(key, _TOKENS), iteration), draws, process.graph, batch, xt, share)

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
        own_key = jax.random.fold_in(_part(key, _TOKENS), _LAST)
        return _fill(own_key, draws, process.graph, batch, batch.given.clamp(batch.xt), batch.plan.num_gaps)


def _part(key: Key[Array, ""], part: int) -> Key[Array, ""]:
    """The key of one of the things that are drawn. It is folded, not split: every call gets the same key."""
    return jax.random.fold_in(key, part)


def _fill(
    key: Key[Array, ""],
    draws: steps.Draws,
    graph: graphs.Graph,
    batch: steps.Batch,
    xt: Int[Array, "B L"],
    count: Int[Array, "B"],
) -> Int[Array, "B L"]:
    """Fills the next `count` masks of each sequence, with the score at the time when the first of them is filled."""
    is_mask = batch.given.is_movable(graph, xt)
    num_masks = is_mask.sum(1)
    sigma = jnp.take_along_axis(batch.plan.sigma, jnp.maximum(num_masks - 1, 0)[:, None], axis=1)[:, 0]
    order = jnp.where(is_mask, batch.plan.rank, -1)
    lowest = jnp.take_along_axis(jnp.sort(order, descending=True), jnp.maximum(count - 1, 0)[:, None], axis=1)
    is_next = is_mask & (order >= lowest)
    return draws.move(key, xt, sigma, is_next, lambda total: graph.denoise_jump(total, xt, sigma))
