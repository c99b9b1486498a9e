"""Carrying checkpoints between run directories and the published PyTorch layout (config.json + model.safetensors)."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sedd_jax import config as configs
from sedd_jax import networks, optimizers, runs, storage, tokenizers, torch_weights, train_state

_WEIGHTS = "model.safetensors"
# Where the published config.json keeps what ours does.
_FIELDS = (
    ("data.length", ("model", "length")),
    ("network.hidden_size", ("model", "hidden_size")),
    ("network.num_layers", ("model", "n_blocks")),
    ("network.num_heads", ("model", "n_heads")),
    ("network.cond_dim", ("model", "cond_dim")),
    ("network.dropout", ("model", "dropout")),
    ("network.scale_by_sigma", ("model", "scale_by_sigma")),
    ("graph.name", ("graph", "type")),
    ("noise.name", ("noise", "type")),
    ("noise.sigma_min", ("noise", "sigma_min")),
    ("noise.sigma_max", ("noise", "sigma_max")),
    ("optimizer.learning_rate", ("optim", "lr")),
    ("optimizer.warmup_steps", ("optim", "warmup")),
    ("optimizer.beta1", ("optim", "beta1")),
    ("optimizer.beta2", ("optim", "beta2")),
    ("optimizer.eps", ("optim", "eps")),
    ("optimizer.weight_decay", ("optim", "weight_decay")),
    ("optimizer.clip_norm", ("optim", "grad_clip")),
    ("optimizer.ema_decay", ("training", "ema")),
    ("training.batch_size", ("training", "batch_size")),
    ("training.num_micro_batches", ("training", "accum")),
    ("training.num_steps", ("training", "n_iters")),
)


def convert(
    source: storage.Directory, target: storage.Directory, *, step: int | None = None, tokenizer: str = ""
) -> str:
    """Converts a published directory into a run directory, or a run directory's moving average into a published one.

    Args:
        source: either kind of directory.
        target: a directory that does not exist yet.
        step: of a run directory's checkpoint; the newest if None.
        tokenizer: for a run directory: a spec as in config.data.tokenizer; GPT-2 for 50257 tokens and plain ids
            otherwise.

    Returns:
        What was done, in one line.

    Raises:
        ValueError: where the source is neither kind, is damaged, or its config and weights disagree.
    """
    for flag, place in (("from", source), ("to", target)):
        if not isinstance(place, pathlib.Path):
            raise ValueError(f"--{flag}={place} is in a bucket: copy it, and give a local directory")
    assert isinstance(source, pathlib.Path)
    assert isinstance(target, pathlib.Path)
    if (source / _WEIGHTS).exists():
        if step is not None:
            raise ValueError(f"--step={step} has no use here: {source} holds one set of weights")
        return _to_run(source, target, tokenizer)
    if (source / "checkpoints").exists():
        if tokenizer:
            raise ValueError(f"--tokenizer={tokenizer} has no use here: {source} is a run directory and has its own")
        return _to_torch(source, target, step)
    raise ValueError(
        f"{source} has neither {_WEIGHTS} (a published PyTorch directory) nor checkpoints/ (a run directory): give "
        "one of them"
    )


def read_published(source: pathlib.Path) -> tuple[configs.Config, int, networks.Params]:
    """Config, number of tokens N and parameters of a published directory.

    Raises:
        ValueError: names what is missing, damaged or contradictory.
    """
    config, num_tokens = _read_config(source / "config.json")
    try:
        tensors = safetensors.numpy.load_file(source / _WEIGHTS)
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(f"{source / _WEIGHTS} cannot be read as safetensors ({error}): copy it again") from error
    network = _network(config, num_tokens)
    return config, num_tokens, torch_weights.from_torch(tensors, network)


def _to_run(source: pathlib.Path, target: pathlib.Path, spec: str) -> str:
    config, num_tokens, params = read_published(source)
    built = tokenizers.build(spec or ("gpt2" if num_tokens == 50257 else f"ids:{num_tokens}"), lambda: iter(()))
    real_tokens = built.vocab_size if built.mask_id is None or config.graph.name == "absorb" else built.vocab_size + 1
    if real_tokens != num_tokens:
        raise ValueError(
            f"--tokenizer={spec} has {real_tokens} tokens, the checkpoint {num_tokens}: give its own tokenizer"
        )
    state = train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=params,
        opt_state=optimizers.make_optimizer(config.optimizer).init(params),
    )
    runs.start_converted(target, config, built, state)
    return f"wrote run directory {target}: {_size(params)} parameters, optimizer state fresh"


def _to_torch(source: pathlib.Path, target: pathlib.Path, step: int | None) -> str:
    run = runs.load(source)
    if run.is_autoregressive:
        raise ValueError(f"{source} is an autoregressive run: the published layout is for diffusion models")
    if run.graph.num_states - 1 != getattr(run.graph, "mask_id", run.graph.num_states - 1):
        raise ValueError(
            f"{source} has its mask at id {run.tokenizer.mask_id}; the published layout knows only the last id"
        )
    if target.exists():
        raise ValueError(f"{target} exists: use another --to")
    step, params = run.ema_params(step=step)
    tensors = torch_weights.to_torch(params, run.network)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(_published_config(run), indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
    return f"wrote {target}: moving average of step {step}, {len(tensors)} tensors"


def _read_config(path: pathlib.Path) -> tuple[configs.Config, int]:
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: a published directory has one beside {_WEIGHTS}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    flat: dict[str, Any] = configs.flatten(configs.to_dict(configs.Config()))
    for ours, (section, name) in _FIELDS:
        try:
            value = published[section][name]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has no {section}.{name}: it is not a published SEDD config") from error
        # JSON and YAML write 1.0 as 1 where they can.
        flat[ours] = type(flat[ours])(value) if isinstance(value, int | float) else value
    flat["data.source"], flat["network.dtype"] = "", "float32"
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    num_tokens = published.get("tokens")
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"{path} has tokens={num_tokens!r}: it must be the number of real tokens")
    return configs.parse(nested), num_tokens


def _published_config(run: runs.Run) -> dict[str, Any]:
    flat = configs.flatten(configs.to_dict(run.config))
    published: dict[str, Any] = {"ngpus": 1, "tokens": run.graph.vocab_size, "model_type": "sedd"}
    for ours, (section, name) in _FIELDS:
        published.setdefault(section, {})[name] = flat[ours]
    published["model"] |= {"name": "sedd_jax", "type": "ddit"}
    published["graph"] |= {"file": "data", "report_all": False}
    published["optim"]["optimizer"] = "AdamW"
    published["data"] = {"train": run.config.data.source, "valid": run.config.data.source, "cache_dir": "data"}
    published["sampling"] = {"predictor": "analytic", "steps": run.config.sampling.num_steps, "noise_removal": True}
    return published


def _network(config: configs.Config, num_tokens: int) -> networks.NetworkConfig:
    graph = configs.make_graph(config.graph, num_tokens, None)
    return dataclasses.replace(config.network, num_states=graph.num_states)


def _size(params: networks.Params) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))
