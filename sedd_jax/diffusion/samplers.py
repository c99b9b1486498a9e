"""Samplers: the interface that all have, and the one table of them.

A new sampler is a file and a line in `SAMPLERS`. One that steps through time needs a `steps.StepFn` alone, or, if it
takes one evaluation a step, a function such as `steps.tweedie`.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Int, Key

from sedd_jax.diffusion import first_hitting, forward, steps, trapezoidal


@runtime_checkable
class Sampler(Protocol):
    """A way to draw sequences from the reverse process.

    Attributes:
        traits: what it is, needs and takes.
        corrector_steps: how often each step is taken back and again.
    """

    @property
    def traits(self) -> steps.Traits: ...
    @property
    def corrector_steps(self) -> int: ...

    def num_steps(self, num_steps: int, num_gaps: int) -> int:
        """Steps of a sequence with `num_gaps` tokens to fill, of `num_steps` that are asked for."""
        ...

    def begin(self, key: Key[Array, ""], process: forward.Process, given: steps.Given) -> Any:
        """What is drawn beforehand for each sequence, as arrays [B, ...]; None where nothing is."""
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
            key: of all iterations.
            iteration: a number that no other call with this key has.
            draws: the network.
            process: the forward process.
            batch: the sequences.
            is_last: which sequences are at their last evaluation, after which no mask may be left; None for none.
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
            key: of all iterations before.
            key_last: of this evaluation alone.
            draws: the network.
            process: the forward process.
            batch: the sequences, all at their last evaluation.
        """
        ...


SAMPLERS: dict[str, Sampler] = {
    "tweedie": steps.TimeStepping(
        traits=steps.Traits(
            meaning='published as "analytic": the best step that moves positions independently',
            published_name="analytic",
        ),
        step_fn=steps.one_evaluation(steps.tweedie),
    ),
    "euler": steps.TimeStepping(
        traits=steps.Traits(meaning="rates of first order", published_name="euler"),
        step_fn=steps.one_evaluation(steps.euler),
    ),
    "tau_leaping": steps.TimeStepping(
        traits=steps.Traits(meaning="rates frozen over a step"), step_fn=steps.one_evaluation(steps.tau_leaping)
    ),
    "theta_trapezoidal": steps.TimeStepping(
        traits=steps.Traits(meaning="second order, two evaluations a step", evaluations=2, takes_guidance=False),
        step_fn=trapezoidal.step,
    ),
    "first_hitting": first_hitting.FirstHitting(
        traits=steps.Traits(
            meaning="absorbing graph: exact with an evaluation for each token",
            needs_mask=True,
            takes_grid=False,
            ends_with_masks=True,
        )
    ),
}


def make(name: str, *, grid: str = "uniform", corrector_steps: int = 0) -> Sampler:
    """The sampler of a name in `SAMPLERS`, its steps at the times of `grid` where it takes one."""
    sampler: Any = SAMPLERS[name]
    fields = {"grid": grid} if sampler.traits.takes_grid else {}
    return dataclasses.replace(sampler, corrector_steps=corrector_steps, **fields)
