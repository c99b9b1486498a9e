"""What of a run's config says how text is drawn, and the values that it stands for."""

import dataclasses
from typing import Any

from sedd_jax.diffusion import samplers, time_grids
from sedd_jax.model import controls, score_draws
from sedd_jax.runtime import errors


def _refinement(default: Any, *, is_control: bool = False) -> Any:
    """A field that refines any sampler; its default leaves the sampler as it is.

    From these fields come the flags of `sedd sample` and `sedd eval`, what results record, and what older run
    directories get that lack one. A control changes the distribution of each token (`controls.Control`).
    """
    return dataclasses.field(default=default, metadata={"refines": True, "is_control": is_control})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Samples drawn while training, and what `sedd sample` does unless told.

    Attributes:
        sampler: how the forward process is reversed.
        num_steps: reverse steps; one more network evaluation denoises.
        num_samples: sequences drawn at once.
        draw: precision of the sampling noise: precise, or published (truncated float32 noise, which anneals; for
            comparison).
        grid: where steps lie in time: uniform, sigma (as much noise each), cosine (short ones first), tuned (made by
            `sedd tune-grid`), or times such as 1,0.8,0.3,0.
        corrector_steps: how often each step is taken back, by the forward process, and taken again.
        temperature: of each token's distribution; below 1 is annealing: less entropy, flattered perplexity.
        top_p: nucleus (top-p) sampling: only the likeliest tokens with this share are drawn; below 1 is annealing.
        guidance: classifier-free guidance scale (absorbing graph); 1 is none, more follows the given text more closely.
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
    temperature: float = _refinement(1.0, is_control=True)
    top_p: float = _refinement(1.0, is_control=True)
    guidance: float = _refinement(1.0, is_control=True)


_FIELDS = dataclasses.fields(SamplingConfig)
# Fields that refine any sampler, with what leaves it as it is.
REFINEMENTS: dict[str, Any] = {field.name: field.default for field in _FIELDS if field.metadata.get("refines")}
CONTROLS = tuple(field.name for field in _FIELDS if field.metadata.get("is_control"))


def refinements(config: SamplingConfig) -> dict[str, Any]:
    """The values of the fields that refine any sampler."""
    return {name: getattr(config, name) for name in REFINEMENTS}


def make_control(config: SamplingConfig) -> controls.Control:
    """How the distribution of each token is changed."""
    return controls.Control(**{name: getattr(config, name) for name in CONTROLS})


def make_sampler(config: SamplingConfig) -> samplers.Sampler:
    """The sampler with its grid and corrector steps."""
    return samplers.make(config.sampler, grid=config.grid, corrector_steps=config.corrector_steps)


def validate(config: SamplingConfig, graph: str, *, has_mask: bool, is_diffusion: bool) -> None:
    """Raises errors.UserError where the values are impossible, alone or with the graph of that name."""
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
            f"is no grid ({error})",
            f"name one of {', '.join(time_grids.NAMES)}, tuned (made by `sedd tune-grid`), or give times that go down "
            "from 1 to 0, such as 1,0.8,0.3,0",
        ) from error
    if not sampler.traits.takes_grid and config.grid != REFINEMENTS["grid"]:
        problem = f"has no meaning for {config.sampler}, which has a clock of its own"
        raise refuse("grid", problem, f"leave it at {REFINEMENTS['grid']}")
    # A temperature below is float32's noise.
    for name, is_fine, wanted in (
        ("temperature", config.temperature >= 1e-6, "at least 1e-6"),
        ("top_p", 1e-6 <= config.top_p <= 1, "from 1e-6 to 1"),
        ("guidance", config.guidance > 0, "above 0"),
    ):
        if not is_fine:
            raise refuse(name, f"must be {wanted}", "1 leaves the distribution as it is")
    changed = [name for name in CONTROLS if getattr(config, name) != REFINEMENTS[name]]
    if changed and config.draw != "precise":
        problem = f"is a control of precise draws, not of {errors.name('config.sampling.draw')}={config.draw}"
        raise refuse(changed[0], problem, f"set {errors.name('config.sampling.draw')}=precise")
    if config.guidance != 1 and not (has_mask and is_diffusion and sampler.traits.takes_guidance):
        raise refuse(
            "guidance",
            "takes an absorbing run, where what is given can be masked, and a sampler with guidance, not "
            f"{errors.name('config.graph.name')}={graph} with "
            f"{errors.name('config.sampling.sampler')}={config.sampler}",
            "leave it at 1",
        )
