"""The sampling section of a run's config, and the sampler and controls that it describes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sedd_jax.model import controls, score_draws
from sedd_jax.reverse import correctors, samplers, time_grids
from sedd_jax.runtime import errors


def _refinement(default: Any, *, is_control: bool = False) -> Any:
    """A field that refines any sampler; its default leaves the sampler as it is.

    `sedd sample` and `sedd eval` have a flag for each such field, and results record its value. An older run directory
    that lacks the field gets its default. A control changes the distribution of each token (`controls.Control`).
    """
    return dataclasses.field(default=default, metadata={"refines": True, "is_control": is_control})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are drawn in training, and the defaults of `sedd sample`.

    Attributes:
        sampler: how the forward process is reversed.
        num_steps: number of reverse steps; one more network evaluation denoises at the end.
        num_samples: number of sequences drawn at once.
        draw: precision of the sampling noise: precise, or published (for comparison; its truncated float32 noise
            lowers the entropy of samples).
        grid: times of the reverse steps: uniform, sigma (the same noise per step), cosine (short steps first), tuned
            (made by `sedd tune-grid`), or a list of times such as 1,0.8,0.3,0.
        corrector_steps: corrector steps after each step; each costs the network evaluations of a step.
        corrector: what a corrector step is: forward_backward (the forward process undoes the step, and it is taken
            again); for the uniform graph also gibbs (one token of a sequence, chosen at random, is redrawn given all
            others; exact for a true score) or gibbs:margin:K (the K tokens whose best two values are closest are
            redrawn at once; approximate).
        temperature: softmax temperature of each token's distribution; below 1 is annealing, which lowers entropy and
            flatters perplexity.
        top_p: nucleus (top-p) sampling: only the likeliest tokens with this total probability are drawn; 1 draws all,
            and below 1 is annealing.
        guidance: classifier-free guidance scale; 1 is none, and a larger one follows the given text more closely.
    """

    sampler: str = dataclasses.field(
        default="tweedie",
        metadata={"choices": lambda: {name: one.traits.meaning for name, one in samplers.SAMPLERS.items()}},
    )
    num_steps: int = 128
    num_samples: int = 4
    draw: str = "precise"
    grid: str = _refinement("uniform")
    corrector_steps: int = _refinement(0)
    corrector: str = _refinement(correctors.FORWARD_BACKWARD)
    temperature: float = _refinement(1.0, is_control=True)
    top_p: float = _refinement(1.0, is_control=True)
    guidance: float = _refinement(1.0, is_control=True)


_FIELDS = dataclasses.fields(SamplingConfig)
# Fields that refine any sampler -> defaults, which leave it as it is.
REFINEMENTS: dict[str, Any] = {field.name: field.default for field in _FIELDS if field.metadata.get("refines")}
CONTROLS = tuple(field.name for field in _FIELDS if field.metadata.get("is_control"))


def refinements(config: SamplingConfig) -> dict[str, Any]:
    """The values of the fields that refine any sampler."""
    return {name: getattr(config, name) for name in REFINEMENTS}


def make_control(config: SamplingConfig) -> controls.Control:
    """The control that a config describes: how the distribution of each token is changed."""
    return controls.Control(**{name: getattr(config, name) for name in CONTROLS})


def make_sampler(config: SamplingConfig) -> samplers.Sampler:
    """The sampler that a config describes, with its time grid and corrector steps."""
    return samplers.make(
        config.sampler, grid=config.grid, corrector_steps=config.corrector_steps, corrector=config.corrector
    )


def validate(config: SamplingConfig, graph: str, *, has_mask: bool, is_diffusion: bool) -> None:
    """Checks the values, alone and together with the graph.

    Args:
        config: the values.
        graph: name of the graph.
        has_mask: whether the graph has a mask.
        is_diffusion: whether the run is a diffusion model, not the autoregressive baseline.

    Raises:
        errors.UserError: names the field that cannot be used, its value and the remedy.
    """
    for name, choices in (("sampler", samplers.SAMPLERS), ("draw", score_draws.DRAWS)):
        if (value := getattr(config, name)) not in choices:
            raise errors.UserError(
                "is unknown", field=f"config.sampling.{name}", value=value, remedy=f"choose one of {', '.join(choices)}"
            )
    sampler = samplers.SAMPLERS[config.sampler]
    refuse = lambda name, problem, remedy: errors.UserError(
        problem, field=f"config.sampling.{name}", value=getattr(config, name), remedy=remedy
    )
    if sampler.traits.needs_mask and not has_mask:
        others = [name for name, other in samplers.SAMPLERS.items() if not other.traits.needs_mask]
        problem = f"follows masks, of which {errors.name('config.graph.name')}={graph} has none"
        raise refuse("sampler", problem, f"set {errors.name('config.sampling.sampler')}={others[0]}")
    try:
        time_grids.find(config.grid)
    except ValueError as error:
        raise refuse(
            "grid",
            "is no grid",
            f"name one of {', '.join(time_grids.NAMES)}, give times that go down from 1 to 0, such as 1,0.8,0.3,0, or "
            "let `sedd tune-grid` make them for --grid=tuned",
        ) from error
    if not sampler.traits.takes_grid and config.grid != REFINEMENTS["grid"]:
        problem = f"has no meaning for {config.sampler}, which chooses its own times"
        raise refuse("grid", problem, f"leave it at {REFINEMENTS['grid']}")
    _validate_corrector(config, refuse, has_mask=has_mask)
    # At a temperature below 1e-6, float32 rounding would decide; above 1e6 there is no difference, or an infinite one.
    for name, is_fine, wanted in (
        ("temperature", 1e-6 <= config.temperature <= 1e6, "from 1e-6 to 1e6"),
        ("top_p", 1e-6 <= config.top_p <= 1, "from 1e-6 to 1"),
        ("guidance", 0 < config.guidance <= 1e6, "above 0, and at most 1e6"),
    ):
        if not is_fine:
            raise refuse(name, f"must be {wanted}", "1 leaves the distribution as it is")
    changed = [name for name in CONTROLS if getattr(config, name) != REFINEMENTS[name]]
    if changed and config.draw != "precise":
        problem = f"is a control of precise draws, not of {errors.name('config.sampling.draw')}={config.draw}"
        raise refuse(changed[0], problem, f"set {errors.name('config.sampling.draw')}=precise")
    if config.guidance != 1 and not (is_diffusion and sampler.traits.takes_guidance):
        raise refuse(
            "guidance",
            "takes a diffusion run, whose known tokens can be hidden, and a sampler that supports guidance, not "
            f"{errors.name('config.graph.name')}={graph} with "
            f"{errors.name('config.sampling.sampler')}={config.sampler}",
            "leave it at 1",
        )


def _validate_corrector(
    config: SamplingConfig, refuse: Callable[[str, str, str], errors.UserError], *, has_mask: bool
) -> None:
    try:
        gibbs = correctors.find(config.corrector)
    except ValueError as error:
        raise refuse("corrector", "is unknown", f"choose one of {', '.join(correctors.FORMS)}") from error
    if gibbs is None:
        return
    own = f"set it to {correctors.FORWARD_BACKWARD}"
    if has_mask:
        problem = "redraws tokens from the score of a graph without masks (uniform); a mask's score says nothing of its"
        raise refuse("corrector", f"{problem} neighbours' tokens", own)
    if not config.corrector_steps:
        steps = errors.name("config.sampling.corrector_steps")
        raise refuse("corrector", f"does nothing with {steps}=0", f"set {steps} to at least 1")
