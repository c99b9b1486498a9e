"""Samplers: their common interface, and the one table of all of them.

A new sampler is a new file and a line in `SAMPLERS`. A sampler that steps through time only needs a `steps.StepFn`. If
it makes one network evaluation per step, it only needs a function such as `steps.tweedie`.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Int, Key

from sedd_jax.diffusion import forward
from sedd_jax.reverse import correctors, entropy_bound, first_hitting, steps, trapezoidal


@runtime_checkable
class Sampler(Protocol):
    """A way to draw sequences from the reverse process.

    Attributes:
        traits: what the sampler is, needs and supports.
        corrector_steps: corrector steps after each step; each costs the evaluations of a step.
    """

    @property
    def traits(self) -> steps.Traits: ...
    @property
    def corrector_steps(self) -> int: ...

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """Number of steps for a sequence with `num_gaps` tokens to fill, if `num_steps` are asked for."""
        ...

    def begin(self, key: Key[Array, ""], process: forward.Process, given: steps.Given) -> Any:
        """The plan: what is drawn for each sequence before its first step, as arrays [B, ...]; None for no plan."""
        ...

    def take(
        self,
        key: Key[Array, ""],
        iteration: Int[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
        is_last: Bool[Array, "B"] | None = None,
    ) -> Int[Array, "B L"]:
        """The states of every sequence one iteration later.

        Args:
            key: key of all iterations.
            iteration: number of this call; no other call with this key may have it.
            draws: the network.
            process: the forward process.
            batch: the sequences.
            is_last: which sequences are at their last evaluation, after which no mask may be left; None if none are.
        """
        ...

    def finish(
        self,
        key: Key[Array, ""],
        key_last: Key[Array, ""],
        draws: steps.Draws,
        process: forward.Process,
        batch: steps.Batch,
    ) -> Int[Array, "B L"]:
        """Clean tokens, by the last evaluation of every sequence.

        Args:
            key: key of all iterations before.
            key_last: key of this evaluation only.
            draws: the network.
            process: the forward process.
            batch: the sequences, all at their last evaluation.
        """
        ...


SAMPLERS: dict[str, Sampler] = {
    "tweedie": steps.TimeStepping(
        traits=steps.Traits(
            meaning='published as "analytic": the optimal step that changes positions independently',
            published_name="analytic",
        ),
        step_fn=steps.one_evaluation(steps.tweedie),
    ),
    "euler": steps.TimeStepping(
        traits=steps.Traits(meaning="Euler step, first order", published_name="euler"),
        step_fn=steps.one_evaluation(steps.euler),
    ),
    "tau_leaping": steps.TimeStepping(
        traits=steps.Traits(meaning="jump rates held constant over a step"),
        step_fn=steps.one_evaluation(steps.tau_leaping),
    ),
    "theta_trapezoidal": steps.TimeStepping(
        traits=steps.Traits(
            meaning="second order, two network evaluations per step", evaluations=2, takes_guidance=False
        ),
        step_fn=trapezoidal.step,
    ),
    "first_hitting": first_hitting.FirstHitting(
        traits=steps.Traits(
            meaning="absorbing graph only: exact with one network evaluation per token",
            needs_mask=True,
            takes_grid=False,
            ends_with_masks=True,
        )
    ),
    "entropy_bound": entropy_bound.EntropyBound(
        traits=steps.Traits(
            meaning="absorbing graph only, biased: fills the surest masks first, so it may take fewer evaluations",
            needs_mask=True,
            takes_grid=False,
            ends_with_masks=True,
            is_biased=True,
            is_adaptive=True,
        )
    ),
}


def make(
    name: str, *, grid: str = "uniform", corrector_steps: int = 0, corrector: str = correctors.FORWARD_BACKWARD
) -> Sampler:
    """The sampler with a name in `SAMPLERS`; if it has a time grid, with this `grid` and `corrector`."""
    sampler: Any = SAMPLERS[name]
    fields = {"grid": grid, "corrector": corrector} if sampler.traits.takes_grid else {}
    return dataclasses.replace(sampler, corrector_steps=corrector_steps, **fields)
