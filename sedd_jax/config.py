"""Configs: a ConfigDict at the edge, frozen dataclasses inside, validated once."""

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_collections

from sedd_jax.diffusion import first_hitting, graphs, noise_schedules, samplers, time_grids, trapezoidal
from sedd_jax.model import attentions, controls, networks, optimizers, score_draws
from sedd_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned.

    Attributes:
        source: prepared:DIR as `sedd prepare` made it, or a source that it takes: python:docs, text:GLOB, jsonl:GLOB...
        tokenizer: characters (the corpus' own), bytes, gpt2, sentencepiece:N and others; that of prepared text.
        length: tokens in a sequence.
    """

    source: str = "python:docs"
    tokenizer: str = "characters"
    length: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """The forward process.

    Attributes:
        name: absorb, uniform, or autoregressive: none at all, the baseline that predicts tokens from those before.
    """

    name: str = "absorb"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise schedule.

    Attributes:
        name: loglinear or geometric.
        eps: loglinear: share of tokens still unmasked at t = 1.
        sigma_min: geometric: total noise at t = 0.
        sigma_max: geometric: total noise at t = 1.
    """

    name: str = "loglinear"
    eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop.

    Attributes:
        num_steps: optimizer steps.
        batch_size: sequences in a step, over all devices and micro-batches.
        num_micro_batches: parts a step's batch is taken in, their gradients averaged.
        log_every: steps between lines in metrics.jsonl.
        eval_every: steps between evaluations on held-out text; 0 is never.
        eval_sequences: held-out sequences in each of those evaluations, at most.
        sample_every: steps between samples; 0 is never.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep_checkpoints: newest checkpoints kept.
        keep_checkpoints_every: checkpoints at multiples of this step are kept for good; 0 is none.
    """

    num_steps: int = 400_000
    batch_size: int = 512
    num_micro_batches: int = 1
    log_every: int = 50
    eval_every: int = 5_000
    eval_sequences: int = 512
    sample_every: int = 10_000
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    keep_checkpoints_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Samples drawn while training, and what `sedd sample` does unless told.

    Attributes:
        sampler: euler, tau_leaping, tweedie, theta_trapezoidal (two evaluations a step), or first_hitting (absorbing:
            exact from num_steps + 1 = length on).
        num_steps: reverse steps; one more evaluation denoises.
        num_samples: sequences drawn at once.
        draw: precise, or published (truncated float32 noise, which anneals; for comparison).
        grid: where steps lie in time: uniform, sigma (as much noise each), cosine (short ones first), or times such as
            1,0.8,0.3,0.
        corrector_steps: how often each step is taken back, by the forward process, and again.
        temperature: of the law of each token; below 1 is annealing: less entropy, flattered perplexity.
        top_p: share of the likeliest tokens that are drawn at all; below 1 is annealing.
        guidance: how often a token's law counts against that without what is given; 1 is the model's own (absorbing).
    """

    sampler: str = "tweedie"
    num_steps: int = 128
    num_samples: int = 4
    draw: str = "precise"
    grid: str = "uniform"
    corrector_steps: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of.

    Attributes:
        seed: of initialisation, data order, noise and dropout.
        init_from: a run directory, as `sedd convert` makes them, too, whose weights this one starts with; "" for fresh.
    """

    seed: int = 0
    init_from: str = ""
    data: DataConfig = DataConfig()
    graph: GraphConfig = GraphConfig()
    noise: NoiseConfig = NoiseConfig()
    # The number of states is the tokenizer's to say: 0 until it is known.
    network: networks.NetworkConfig = networks.NetworkConfig(num_states=0)
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()


# A ConfigDict is no Mapping.
Nested = Mapping[str, Any] | ml_collections.ConfigDict

# Fields of `SamplingConfig` that refine any sampler, with what leaves it as it is.
REFINEMENTS = {field.name: field.default for field in dataclasses.fields(SamplingConfig)[4:]}
CONTROLS = ("temperature", "top_p", "guidance")
# What a run may change when it resumes; all else decides what its parameters are.
MAY_CHANGE = (
    r"training\.(num_steps|log_every|eval_\w+|sample_every|\w*checkpoint\w*)",
    r"sampling\..*",
    r"mesh\..*",
    r"network\.(remat|attention)",
)
_DERIVED = {"network.num_states": 0, "network.causal": False}  # Known from the tokenizer and the graph only.
_MAY_BE_ZERO = r"eval_every|sample_every|seed|warmup|keep_checkpoints_every|corrector_steps"
AUTOREGRESSIVE = "autoregressive"


def default() -> ml_collections.ConfigDict:
    """Every field with its default, locked."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def merge(partial: Nested) -> ml_collections.ConfigDict:
    """The defaults with the fields of `partial` put over them.

    Raises:
        ValueError: names a field that does not exist and the nearest that does, or a value of the wrong type.
    """
    merged = default()
    for name, value in flatten(partial).items():
        check_field(name, merged)
        try:
            merged.update_from_flattened_dict({name: value})
        except TypeError:
            raise ValueError(wrong_type(name, value, merged)) from None
    return merged


def check_field(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises ValueError with the nearest field's name where `name` is not one of the config's."""
    fields = flatten(config)
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean config.{nearest[0]}?" if nearest else "`sedd train --help` lists the fields"
        raise ValueError(f"config.{name} is not a field: {hint}")


def wrong_type(name: str, value: Any, config: ml_collections.ConfigDict) -> str:
    """The message for a value that does not fit its field."""
    want = type(flatten(config)[name]).__name__
    return f"config.{name}={value!r} must be of type {want}"


def parse(config: Nested) -> Config:
    """Frozen dataclasses from a full ConfigDict (or the same as nested mappings), validated.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    parsed = _parse(Config, dict(config), "")
    validate(parsed)
    return parsed


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, without what is derived."""
    nested = dataclasses.asdict(config)
    for path in _DERIVED:
        del nested["network"][path.removeprefix("network.")]
    return nested


def flatten(nested: Nested, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changes(old: Config, new: Config) -> list[str]:
    """Differences that a resumed run may not have, each as one phrase."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"config.{name} was {before[name]!r} and is now {after[name]!r}"
        for name in after
        if before[name] != after[name] and not any(re.fullmatch(pattern, name) for pattern in MAY_CHANGE)
    ]


def describe(config: Nested) -> Iterator[tuple[str, Any, str]]:
    """Name, value and meaning of every field, in order; meanings come from the dataclasses' docstrings."""
    values = flatten(config)
    for name, meaning in _meanings(Config, ""):
        if name not in _DERIVED:
            yield name, values[name], meaning


def validate(config: Config) -> None:
    """Raises ValueError where values are impossible on their own or together."""
    _validate_choice("graph.name", config.graph.name, (*graphs.GRAPHS, AUTOREGRESSIVE))
    _validate_choice("noise.name", config.noise.name, noise_schedules.SCHEDULES)
    known = (*samplers.SAMPLERS, trapezoidal.NAME, first_hitting.NAME)
    _validate_choice("sampling.sampler", config.sampling.sampler, known)
    _validate_choice("sampling.draw", config.sampling.draw, score_draws.DRAWS)
    _validate_choice("network.remat", config.network.remat, ("none", *networks.REMAT_POLICIES))
    _validate_choice("network.dropout_generator", config.network.dropout_generator, ("threefry", "rbg"))
    _validate_choice("network.attention", config.network.attention, ("auto", *attentions.ATTENTIONS))
    _validate_choice("network.dtype", config.network.dtype, ("float32", "bfloat16"))
    if config.seed >= 2**32:
        raise ValueError(f"config.seed={config.seed} is more than keys hold: give one below 2**32")
    for name, value in flatten(to_dict(config)).items():
        at_least = 0 if re.search(_MAY_BE_ZERO, name) else 1
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("mesh.") and value < at_least:
            raise ValueError(f"config.{name}={value} must be at least {at_least}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"config.{name}={value} must be a finite number, at least 0")
    network, training, noise = config.network, config.training, config.noise
    if network.hidden_size % (2 * network.num_heads):
        raise ValueError(
            f"config.network.hidden_size={network.hidden_size} must be divisible by twice config.network.num_heads="
            f"{network.num_heads}, since rotary positions pair features"
        )
    if not network.dropout < 1:
        raise ValueError(f"config.network.dropout={network.dropout} must be below 1")
    if config.graph.name != "absorb" and network.scale_by_sigma:
        raise ValueError(
            "config.network.scale_by_sigma=True only has a meaning for the absorbing graph: set it to False for "
            f"{config.graph.name}"
        )
    if network.normalize and not network.scale_by_sigma:
        raise ValueError(
            "config.network.normalize=True fixes the sum of the scores, which depends on sigma: set "
            "config.network.scale_by_sigma=True"
        )
    if config.sampling.sampler == first_hitting.NAME and config.graph.name == "uniform":
        raise ValueError(
            "config.sampling.sampler=first_hitting follows masks, of which config.graph.name=uniform has none: set "
            "config.sampling.sampler=tweedie"
        )
    time_grids.find(config.sampling.grid)
    if config.sampling.sampler == first_hitting.NAME and config.sampling.grid != "uniform":
        raise ValueError(
            f"config.sampling.grid={config.sampling.grid} has no meaning for first_hitting, which has a clock of its "
            "own: leave it at uniform"
        )
    _validate_control(config)
    if training.batch_size % training.num_micro_batches:
        raise ValueError(
            f"config.training.batch_size={training.batch_size} must be divisible by config.training.num_micro_batches="
            f"{training.num_micro_batches}"
        )
    if noise.eps >= 1 or noise.eps == 0 or not 0 < noise.sigma_min < noise.sigma_max:
        raise ValueError(
            f"config.noise needs 0 < eps < 1 and 0 < sigma_min < sigma_max, not eps={noise.eps}, "
            f"sigma_min={noise.sigma_min}, sigma_max={noise.sigma_max}"
        )


def _validate_control(config: Config) -> None:
    sampling = config.sampling
    # Less is float32's noise.
    if sampling.temperature < 1e-6 or not 1e-6 <= sampling.top_p <= 1 or sampling.guidance <= 0:
        raise ValueError(
            "config.sampling needs temperature >= 1e-6, 1e-6 <= top_p <= 1 and guidance > 0, not "
            f"temperature={sampling.temperature}, top_p={sampling.top_p}, guidance={sampling.guidance}"
        )
    changed = [name for name in CONTROLS if getattr(sampling, name) != 1]
    if changed and sampling.draw != "precise":
        raise ValueError(
            f"config.sampling.{changed[0]} is a control of precise draws: set config.sampling.draw=precise"
        )
    if sampling.guidance != 1 and (config.graph.name != "absorb" or sampling.sampler == trapezoidal.NAME):
        raise ValueError(
            f"config.sampling.guidance={sampling.guidance} takes an absorbing run, where what is given can be masked, "
            f"and a sampler of one evaluation a step, not graph.name={config.graph.name} with "
            f"sampler={sampling.sampler}: leave it at 1"
        )


def make_control(sampling: SamplingConfig) -> controls.Control:
    """How the law of tokens is changed."""
    return controls.Control(**{name: getattr(sampling, name) for name in CONTROLS})


def make_noise(config: NoiseConfig) -> noise_schedules.NoiseSchedule:
    """The schedule that a config names."""
    if config.name == "loglinear":
        return noise_schedules.LogLinear(eps=config.eps)
    return noise_schedules.Geometric(sigma_min=config.sigma_min, sigma_max=config.sigma_max)


def make_graph(config: GraphConfig, vocab_size: int, mask_id: int | None) -> graphs.Graph:
    """The graph over a tokenizer's tokens; a tokenizer without a mask gets one after its last token.

    The autoregressive baseline has the states of the absorbing graph: its mask begins every sequence.
    """
    if config.name != "uniform":
        return graphs.Absorbing(vocab_size=vocab_size, mask_id=vocab_size if mask_id is None else mask_id)
    return graphs.Uniform(vocab_size=vocab_size if mask_id is None else vocab_size + 1)


def _validate_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"config.{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def _parse(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise ValueError(f"config.{prefix}{unknown[0]} is not a field: `sedd train --help` lists the fields")
    parsed = {}
    for name, field in fields.items():
        path = prefix + name
        if path in _DERIVED:
            parsed[name] = _DERIVED[path]
        elif name not in values:
            raise ValueError(f"config.{path} is missing")
        elif dataclasses.is_dataclass(field.type):
            parsed[name] = _parse(field.type, dict(values[name]), f"{path}.")
        else:
            parsed[name] = _convert(path, values[name], field.type)
    return cls(**parsed)


def _convert(name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"config.{name}={value!r} must be of type {kind.__name__}")
    return value


def _meanings(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    text = " ".join((cls.__doc__ or "").split("Attributes:")[-1].split())
    names = "|".join(field.name for field in dataclasses.fields(cls))
    parts = re.split(rf"(?:^|\s)({names}): ", text)
    yield from ((prefix + name, meaning) for name, meaning in zip(parts[1::2], parts[2::2], strict=True))
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _meanings(field.type, f"{prefix}{field.name}.")
