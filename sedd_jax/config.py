"""Configs: a ConfigDict at the edge, frozen dataclasses inside, validated once."""

import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import attentions, networks, optimizers, sampling_config
from sedd_jax.runtime import errors, sharding

SamplingConfig = sampling_config.SamplingConfig


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
        name: which token may turn into which.
    """

    name: str = dataclasses.field(default="absorb", metadata={"choices": lambda: graph_meanings()})


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
        num_micro_batches: gradient accumulation: micro-batches per optimizer step, their gradients averaged.
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
_LISTED = "`sedd train --help` lists the fields"


def default() -> ml_collections.ConfigDict:
    """Every field with its default, locked."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def merge(partial: Nested) -> ml_collections.ConfigDict:
    """The defaults with the fields of `partial` put over them.

    Raises:
        errors.UserError: names a field that does not exist and the nearest that does, or a value of the wrong type.
    """
    merged = default()
    for name, value in flatten(partial).items():
        check_field(name, merged)
        try:
            merged.update_from_flattened_dict({name: value})
        except TypeError:
            raise wrong_type(name, value, merged) from None
    return merged


def read_file(path: str | os.PathLike[str]) -> Nested:
    """The fields that a file such as configs/quickstart.py sets.

    Raises:
        errors.UserError: where it is no such file, or fails.
    """
    refuse = lambda problem, remedy: errors.UserError(problem, field="config", value=path, remedy=remedy)
    if not pathlib.Path(path).is_file():
        raise refuse("is not a file", "give one of configs/*.py")
    spec = importlib.util.spec_from_file_location("sedd_config", path)
    if spec is None or spec.loader is None:
        raise refuse("is not a Python file", "give one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:
        # The file is the user's, and so is what goes wrong in it.
        raise refuse(f"fails with {type(error).__name__}: {error}", "mend the file") from error


def check_field(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises errors.UserError with the nearest field's name where `name` is not one of the config's."""
    fields = flatten(config)
    if name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {errors.name(f'config.{nearest[0]}')}?" if nearest else _LISTED
        raise errors.UserError("is not a field", field=f"config.{name}", remedy=hint)


def wrong_type(name: str, value: Any, config: ml_collections.ConfigDict) -> errors.UserError:
    """The error for a value that does not fit its field."""
    return _mistyped(name, value, type(flatten(config)[name]))


def _mistyped(name: str, value: Any, kind: type) -> errors.UserError:
    return errors.UserError(f"must be of type {kind.__name__}", field=f"config.{name}", value=repr(value))


def parse(config: Nested) -> Config:
    """Frozen dataclasses from a full ConfigDict (or the same as nested mappings), validated.

    Raises:
        errors.UserError: names the field, its value and the remedy.
    """
    parsed = _parse(Config, dict(config), "")
    validate(parsed)
    return parsed


def read(saved: Mapping[str, Any]) -> Config:
    """The config of a run directory, also of an earlier version.

    A field that the run lacks was added since. It gets the value that means "as before": `metadata["before"]` of the
    field where there is one, else its default.

    Raises:
        errors.UserError: names a field that is unknown or has an impossible value.
    """
    config = _filled(Config, saved)
    remat = config["network"]["remat"]
    if isinstance(remat, bool):  # What it was before it had names.
        config["network"]["remat"] = "blocks" if remat else "none"
    return parse(config)


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
    """Raises errors.UserError where values are impossible on their own or together."""
    _validate_choices(config)
    if config.seed >= 2**32:
        raise _refused(config, "seed", "is more than keys hold", "give one below 2**32")
    for name, value in flatten(to_dict(config)).items():
        at_least = 0 if re.search(_MAY_BE_ZERO, name) else 1
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("mesh.") and value < at_least:
            raise _refused(config, name, f"must be at least {at_least}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise _refused(config, name, "must be a finite number, at least 0")
    network, training, noise = config.network, config.training, config.noise
    if network.hidden_size % (2 * network.num_heads):
        raise _refused(
            config,
            "network.hidden_size",
            f"must be divisible by twice {errors.name('config.network.num_heads')}={network.num_heads}, since rotary "
            "positions pair features",
        )
    if not network.dropout < 1:
        raise _refused(config, "network.dropout", "must be below 1")
    if network.scale_by_sigma and not (is_diffusion(config) and graph_class(config.graph).scales_by_sigma):
        raise _refused(
            config,
            "network.scale_by_sigma",
            "only has a meaning for the absorbing graph",
            f"set it to False for {config.graph.name}",
        )
    if network.normalize and not network.scale_by_sigma:
        raise _refused(
            config,
            "network.normalize",
            "fixes the sum of the scores, which depends on sigma",
            f"set {errors.name('config.network.scale_by_sigma')}=True",
        )
    sampling_config.validate(
        config.sampling,
        config.graph.name,
        has_mask=graph_class(config.graph).has_mask,
        is_diffusion=is_diffusion(config),
    )
    if training.batch_size % training.num_micro_batches:
        raise _refused(
            config,
            "training.batch_size",
            f"must be divisible by {errors.name('config.training.num_micro_batches')}={training.num_micro_batches}",
        )
    if not 0 < noise.eps < 1:
        raise _refused(config, "noise.eps", "must be between 0 and 1")
    if not 0 < noise.sigma_min < noise.sigma_max:
        raise _refused(
            config,
            "noise.sigma_min",
            f"must be above 0 and below {errors.name('config.noise.sigma_max')}={noise.sigma_max}",
        )


def _validate_choices(config: Config) -> None:
    for name, choices in {
        "graph.name": tuple(graph_meanings()),
        "noise.name": tuple(noise_schedules.SCHEDULES),
        "network.remat": ("none", *networks.REMAT_POLICIES),
        "network.dropout_generator": ("threefry", "rbg"),
        "network.attention": ("auto", *attentions.ATTENTIONS),
        "network.dtype": ("float32", "bfloat16"),
    }.items():
        if flatten(to_dict(config))[name] not in choices:
            raise _refused(config, name, "is unknown", f"choose one of {', '.join(choices)}")


def _refused(config: Config, name: str, problem: str, remedy: str = "") -> errors.UserError:
    value = flatten(to_dict(config))[name]
    return errors.UserError(problem, field=f"config.{name}", value=value, remedy=remedy)


def is_diffusion(config: Config) -> bool:
    """Whether a run is a diffusion model, not the baseline that predicts each token from those before it."""
    return config.graph.name != AUTOREGRESSIVE


def graph_meanings() -> dict[str, str]:
    """What `graph.name` may be, and what each is."""
    baseline = {AUTOREGRESSIVE: "no diffusion: the baseline that predicts each token from those before"}
    return {name: graph.meaning for name, graph in graphs.GRAPHS.items()} | baseline


def graph_class(config: GraphConfig) -> type[Any]:
    """The class of a graph. The baseline has the states of the absorbing one: its mask begins every sequence."""
    return graphs.GRAPHS["absorb" if config.name == AUTOREGRESSIVE else config.name]


def make_process(config: Config, vocab_size: int, mask_id: int | None) -> forward.Process:
    """The forward process that a config names, over a tokenizer's tokens.

    Args:
        config: the config.
        vocab_size: the tokenizer's tokens.
        mask_id: a mask among its own ids; None where it has none, so that the graph adds one if it needs it.
    """
    schedule = noise_schedules.SCHEDULES[config.noise.name]
    noise = schedule(**{field.name: getattr(config.noise, field.name) for field in dataclasses.fields(schedule)})
    return forward.Process(graph_class(config.graph).from_tokenizer(vocab_size, mask_id), noise)


def _parse(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise errors.UserError("is not a field", field=f"config.{prefix}{unknown[0]}", remedy=_LISTED)
    parsed = {}
    for name, field in fields.items():
        path = prefix + name
        if path in _DERIVED:
            parsed[name] = _DERIVED[path]
        elif name not in values:
            raise errors.UserError("is missing", field=f"config.{path}", remedy=_LISTED)
        elif dataclasses.is_dataclass(field.type):
            parsed[name] = _parse(field.type, dict(values[name]), f"{path}.")
        else:
            parsed[name] = _convert(path, values[name], field.type)
    return cls(**parsed)


def _filled(cls: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a section as they were saved, those that it lacks as before."""
    filled = dict(saved)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            filled[field.name] = _filled(field.type, saved.get(field.name, {}))
        elif field.default is not dataclasses.MISSING and f"network.{field.name}" not in _DERIVED:
            filled.setdefault(field.name, field.metadata.get("before", field.default))
    return filled


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
