"""The config of a run: a ConfigDict for the user, frozen dataclasses inside, validated once."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sedd_jax.diffusion import forward, graphs, noise_schedules, time_laws
from sedd_jax.model import attentions, layers, networks, optimizers, sampling_config
from sedd_jax.runtime import errors, sharding

SamplingConfig = sampling_config.SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training text.

    Attributes:
        source: where the text is: prepared:DIR for a directory made by `sedd prepare`, or any source that this command
            accepts, such as python:docs, text:GLOB or jsonl:GLOB.
        tokenizer: characters (those of the corpus), bytes, gpt2, sentencepiece:N (vocabulary of N pieces learned from
            the corpus) and others; for a prepared source, the tokenizer that it was prepared with.
        length: tokens in a sequence.
    """

    source: str = "python:docs"
    tokenizer: str = "characters"
    length: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """The forward process.

    Attributes:
        name: graph, which says which token may turn into which.
    """

    name: str = dataclasses.field(default="absorb", metadata={"choices": lambda: graph_meanings()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop.

    Attributes:
        num_steps: number of optimizer steps.
        batch_size: noised sequences per optimizer step, summed over all devices and micro-batches.
        num_micro_batches: gradient accumulation: micro-batches per optimizer step, whose gradients are averaged.
        time_law: how the times of a step's sequences are drawn; the loss divides it out.
        paired_noise: whether a step noises each sequence of text twice: at times as far from the one end as from the
            other, and what one copy keeps the other loses.
        log_every: optimizer steps between lines in metrics.jsonl.
        eval_every: optimizer steps between evaluations on held-out text; 0 means never.
        eval_sequences: largest number of held-out sequences in an evaluation during training.
        sample_every: optimizer steps between drawing samples; 0 means never.
        checkpoint_every: optimizer steps between checkpoints; the last step is always saved.
        keep_checkpoints: number of newest checkpoints to keep.
        keep_checkpoints_every: also keep all checkpoints at multiples of this step; 0 means none.
        deterministic: whether GPUs use only kernels that give the same bits every time, and are slower; CPUs and TPUs
            have no others.
        profile: START:STEPS traces so many steps after step START into profiles/; "" traces none.
        tracker: what gets curves, config and samples beside the run directory's own files: tensorboard, wandb, trackio
            or none.
    """

    num_steps: int = 400_000
    batch_size: int = 512
    num_micro_batches: int = 1
    time_law: str = dataclasses.field(default="uniform", metadata={"choices": time_laws.time_laws})
    paired_noise: bool = False
    log_every: int = 50
    eval_every: int = 5_000
    eval_sequences: int = 512
    sample_every: int = 10_000
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    keep_checkpoints_every: int = 0
    deterministic: bool = False
    profile: str = ""
    tracker: str = "tensorboard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole config of a run.

    Attributes:
        seed: random seed of initialisation, data order, noise and dropout.
        init_from: run directory (from training or `sedd convert`) whose weights this run starts with; "" for none.
    """

    seed: int = 0
    init_from: str = ""
    data: DataConfig = DataConfig()
    graph: GraphConfig = GraphConfig()
    noise: noise_schedules.NoiseConfig = noise_schedules.NoiseConfig()
    # The tokenizer decides the number of states: 0 until it is known.
    network: networks.NetworkConfig = networks.NetworkConfig(num_states=0)
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()


# A ConfigDict is not a Mapping. What a user writes may have keys that are not text.
Nested = Mapping[Any, Any] | ml_collections.ConfigDict
SECTION = (Mapping, ml_collections.ConfigDict)

# Fields that may change when a run resumes; all others determine its parameters.
MAY_CHANGE = (
    r"training\.(num_steps|log_every|eval_\w+|sample_every|\w*checkpoint\w*|deterministic|profile|tracker)",
    r"sampling\..*",
    r"mesh\..*",
    r"network\.(remat|layer_loop|attention)",
)
DERIVED = {"network.num_states": 0, "network.causal": False}  # They follow from the tokenizer and the graph.
_MAY_BE_ZERO = r"eval_every|sample_every|seed|warmup|keep_checkpoints_every|corrector_steps"
# For sigma_max: e^sigma overflows float32 above.
_BELOW = {"network.dropout": 1, "optimizer.beta1": 1, "optimizer.beta2": 1, "noise.eps": 1, "noise.sigma_max": 88}
AUTOREGRESSIVE = "autoregressive"
_LISTED = "`sedd train --help` lists the fields"


def default() -> ml_collections.ConfigDict:
    """A locked ConfigDict of all fields with their defaults."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def merge(partial: Nested) -> ml_collections.ConfigDict:
    """The defaults, with the fields of `partial` put over them. Names of inner fields may be written data.length.

    Raises:
        errors.UserError: names a field that does not exist and the nearest one that does, or a value of a wrong type.
    """
    merged = default()
    _put(merged, partial, "")
    return merged


def check_field(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises errors.UserError, with the nearest field's name, if `name` is not a field of the config."""
    fields = flatten(config)
    if name in config and name not in fields:
        inside = errors.name("config." + next(field for field in fields if field.startswith(f"{name}.")))
        raise errors.UserError("holds fields of its own", field=f"config.{name}", remedy=f"set one, as in {inside}")
    if name not in fields:
        nearest = difflib.get_close_matches(name, [*fields, *config], n=1, cutoff=0.5)
        hint = f"did you mean {errors.name(f'config.{nearest[0]}')}?" if nearest else _LISTED
        raise errors.UserError("is not a field", field=f"config.{name}", remedy=hint)


def wrong_type(name: str, value: Any, config: ml_collections.ConfigDict) -> errors.UserError:
    """The error for a value that does not have the type of its field."""
    return _mistyped(name, value, type(flatten(config)[name]))


def _mistyped(name: str, value: Any, kind: type) -> errors.UserError:
    return errors.UserError(f"must be of type {kind.__name__}", field=f"config.{name}", value=repr(value))


def section(name: str, value: Any) -> Nested:
    """The value of a section of the config.

    Raises:
        errors.UserError: if it holds no fields.
    """
    if isinstance(value, SECTION):
        return value
    raise errors.UserError("holds no fields", field=f"config.{name}", value=repr(value), remedy=_LISTED)


def parse(config: Nested) -> Config:
    """The validated frozen dataclasses of a complete ConfigDict, or of equal nested mappings.

    Raises:
        errors.UserError: names the field, its value and the remedy.
    """
    parsed = _parse(Config, config, "")
    validate(parsed)
    return parsed


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, without derived fields."""
    nested = dataclasses.asdict(config)
    for path in DERIVED:
        del nested["network"][path.removeprefix("network.")]
    return nested


def flatten(nested: Nested, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, SECTION):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changes(old: Config, new: Config) -> list[str]:
    """Differences that a resumed run may not have, each as a phrase with the old and the new value."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"config.{name} was {before[name]!r} and is now {after[name]!r}"
        for name in after
        if before[name] != after[name] and not any(re.fullmatch(pattern, name) for pattern in MAY_CHANGE)
    ]


def describe(config: Nested) -> Iterator[tuple[str, Any, str]]:
    """Yields name, value and meaning of every field, in order. Meanings come from the dataclasses' docstrings."""
    values = flatten(config)
    for name, meaning in _meanings(Config, ""):
        if name not in DERIVED:
            yield name, values[name], meaning


def validate(config: Config) -> None:
    """Raises errors.UserError where values are impossible, alone or together."""
    _validate_choices(config)
    refuse = functools.partial(_refused, config)
    if config.seed >= 2**32:
        raise refuse("seed", "is too large for a random key", "give one below 2**32")
    for name, value in flatten(to_dict(config)).items():
        at_least = 0 if re.search(_MAY_BE_ZERO, name) else 1
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("mesh.") and value < at_least:
            raise refuse(name, f"must be at least {at_least}")
        if isinstance(value, int) and value >= 2**31 and name != "seed":
            raise refuse(name, "must be below 2**31")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise refuse(name, "must be a finite number, at least 0")
        if name in _BELOW and value >= _BELOW[name]:
            raise refuse(name, f"must be below {_BELOW[name]}")
        if name == "optimizer.eps" and value == 0:
            raise refuse(name, "must be above 0, since gradients may be 0")
    network, training, noise = config.network, config.training, config.noise
    if network.hidden_size % (2 * network.num_heads):
        needed = f"must be divisible by twice {errors.name('config.network.num_heads')}={network.num_heads}"
        raise refuse("network.hidden_size", f"{needed}, since rotary positions pair features")
    if config.optimizer.decay_share > 1:
        raise refuse("optimizer.decay_share", "must be at most 1, all of the steps")
    if network.scale_by_sigma and not (is_diffusion(config) and graph_class(config.graph).scales_by_sigma):
        remedy = f"set it to False for {config.graph.name}"
        raise refuse("network.scale_by_sigma", "only has a meaning for the absorbing graph", remedy)
    if network.normalize and not (network.scale_by_sigma or graph_class(config.graph).mixes_uniformly):
        remedy = f"set {errors.name('config.network.scale_by_sigma')}=True"
        raise refuse("network.normalize", "fixes the sum of the scores, which depends on sigma", remedy)
    has_mask = graph_class(config.graph).has_mask
    sampling_config.validate(config.sampling, config.graph.name, has_mask=has_mask, is_diffusion=is_diffusion(config))
    if training.batch_size % training.num_micro_batches:
        divisor = f"{errors.name('config.training.num_micro_batches')}={training.num_micro_batches}"
        raise refuse("training.batch_size", f"must be divisible by {divisor}")
    if training.paired_noise:
        if not is_diffusion(config):
            raise refuse("training.paired_noise", f"has no meaning for {AUTOREGRESSIVE}", "set it to False")
        if training.batch_size // training.num_micro_batches % 2:
            paired = errors.name("config.training.paired_noise")
            raise refuse("training.batch_size", f"must be even in each micro-batch where {paired}=True")
    if training.profile and not re.fullmatch(r"[0-9]+:0*[1-9][0-9]*", training.profile):
        raise refuse("training.profile", "is not START:STEPS", "give 1000:3, say, for steps 1001 to 1003")
    if noise.eps < 1e-7:  # 1 - eps is 1 in float32, and the noise at t = 1 infinite.
        raise refuse("noise.eps", "must be at least 1e-7")
    if not 0 < noise.sigma_min < noise.sigma_max:
        largest = f"{errors.name('config.noise.sigma_max')}={noise.sigma_max}"
        raise refuse("noise.sigma_min", f"must be above 0 and below {largest}")


def _validate_choices(config: Config) -> None:
    for name, choices in {
        "graph.name": tuple(graph_meanings()),
        "noise.name": tuple(noise_schedules.SCHEDULES),
        "training.time_law": tuple(time_laws.time_laws()),
        "training.tracker": ("tensorboard", "wandb", "trackio", "none"),
        "optimizer.name": optimizers.OPTIMIZERS,
        "optimizer.schedule": optimizers.SCHEDULES,
        "network.remat": ("none", *networks.REMAT_POLICIES),
        "network.dropout_generator": ("threefry", "rbg"),
        "network.attention": ("auto", *attentions.ATTENTIONS),
        "network.layer_loop": networks.LAYER_LOOPS,
        "network.dtype": tuple(layers.DTYPES),
    }.items():
        if flatten(to_dict(config))[name] not in choices:
            raise _refused(config, name, "is unknown", f"choose one of {', '.join(choices)}")


def _refused(config: Config, name: str, problem: str, remedy: str = "") -> errors.UserError:
    value = flatten(to_dict(config))[name]
    return errors.UserError(problem, field=f"config.{name}", value=value, remedy=remedy)


def is_diffusion(config: Config) -> bool:
    """Whether a run is a diffusion model, not the autoregressive baseline."""
    return config.graph.name != AUTOREGRESSIVE


def graph_meanings() -> dict[str, str]:
    """Possible values of `graph.name`, and the meaning of each."""
    baseline = {AUTOREGRESSIVE: "no diffusion: the baseline that predicts each token from those before it"}
    return {name: graph.meaning for name, graph in graphs.GRAPHS.items()} | baseline


def graph_class(config: GraphConfig) -> type[Any]:
    """The class of the graph. The baseline has the states of the absorbing graph; its mask begins every sequence."""
    return graphs.GRAPHS["absorb" if config.name == AUTOREGRESSIVE else config.name]


def make_process(config: Config, vocab_size: int, mask_id: int | None) -> forward.Process:
    """The forward process that a config describes, over a tokenizer's tokens.

    Args:
        config: the config.
        vocab_size: number of the tokenizer's tokens.
        mask_id: id of the tokenizer's own mask token; None if it has none, and then the absorbing graph adds one.
    """
    schedule = noise_schedules.SCHEDULES[config.noise.name]
    noise = schedule(**{field.name: getattr(config.noise, field.name) for field in dataclasses.fields(schedule)})
    return forward.Process(graph_class(config.graph).from_tokenizer(vocab_size, mask_id), noise)


def _put(merged: ml_collections.ConfigDict, partial: Nested, prefix: str) -> None:
    """Puts fields, whose names begin with `prefix`, over those of a config."""
    sections = {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
    for key, value in partial.items():
        if not isinstance(key, str):
            raise errors.UserError(
                f"has the key {key!r}, which is not text", field=f"config.{prefix}".rstrip("."), remedy=_LISTED
            )
        name = prefix + key
        if name in sections:
            _put(merged, section(name, value), f"{name}.")
            continue
        check_field(name, merged)
        if isinstance(value, SECTION):
            raise wrong_type(name, value, merged)
        try:
            merged.update_from_flattened_dict({name: value})
        except TypeError:
            raise wrong_type(name, value, merged) from None


def _parse(cls: Any, values: Nested, prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise errors.UserError("is not a field", field=f"config.{prefix}{unknown[0]}", remedy=_LISTED)
    parsed = {}
    for name, field in fields.items():
        path = prefix + name
        if path in DERIVED:
            parsed[name] = DERIVED[path]
        elif name not in values:
            raise errors.UserError("is missing", field=f"config.{path}", remedy=_LISTED)
        elif dataclasses.is_dataclass(field.type):
            parsed[name] = _parse(field.type, section(path, values[name]), f"{path}.")
        else:
            parsed[name] = _convert(path, values[name], field.type)
    return cls(**parsed)


def _convert(name: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise _mistyped(name, value, kind)
    return value


def _meanings(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    text = " ".join((cls.__doc__ or "").split("Attributes:")[-1].split())
    names = "|".join(field.name for field in dataclasses.fields(cls))
    parts = re.split(rf"(?:^|\s)({names}): ", text)
    choices = {field.name: field.metadata.get("choices", dict) for field in dataclasses.fields(cls)}
    for name, meaning in zip(parts[1::2], parts[2::2], strict=True):
        known = "; ".join(f"{choice} ({what})" for choice, what in choices[name]().items())
        yield prefix + name, f"{meaning.removesuffix('.')}: {known}." if known else meaning
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _meanings(field.type, f"{prefix}{field.name}.")
