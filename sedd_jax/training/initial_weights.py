"""Training that starts from another run's weights: fine-tuning a converted checkpoint, or a model of one's own."""

import dataclasses

import jax
import jax.numpy as jnp

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import train_state
from sedd_jax.runtime import storage

# What the weights depend on; length, noise schedule and tokenizer may be others.
_SAME = (
    "network.hidden_size",
    "network.num_layers",
    "network.num_heads",
    "network.cond_dim",
    "network.mlp_ratio",
    "network.scale_by_sigma",
    "network.normalize",
)
_OF_TOKENS = ("embedding", "head_kernel", "head_bias")


def check(config: configs.Config) -> None:
    """Raises ValueError where config.init_from is no run directory, or of a network of another kind or size."""
    directory = storage.directory(config.init_from)
    if not storage.holds(directory, storage.CHECKPOINTS):
        raise ValueError(
            f"config.init_from={directory} is no run directory: `sedd convert --from={directory} --to=DIR` makes one "
            "of a published model"
        )
    source = runs.load(directory).config
    if source.graph.name != config.graph.name:
        raise ValueError(
            f"config.init_from={config.init_from} has config.graph.name={source.graph.name}, this run "
            f"{config.graph.name}: what the one has learned means nothing to the other; start without init_from"
        )
    ours, theirs = (configs.flatten(configs.to_dict(each)) for each in (config, source))
    for name in _SAME:
        if ours[name] != theirs[name]:
            raise ValueError(
                f"config.{name}={ours[name]} must be {theirs[name]}, as in config.init_from={config.init_from}"
            )


def take(run: runs.Run, state: train_state.TrainState, mesh: jax.sharding.Mesh) -> tuple[train_state.TrainState, str]:
    """A fresh state with the moving average of config.init_from's newest checkpoint as its weights.

    Where the tokenizer is another, embedding and head stay fresh.

    Args:
        run: the run that starts.
        state: its fresh state.
        mesh: on which both lie.

    Returns:
        The state, and what was taken, for the user.
    """
    source = runs.load(storage.directory(run.config.init_from))
    step, params = source.params("ema_params", mesh)
    said = f"weights are those of step {step} of {run.config.init_from}, averaged"
    if source.tokenizer.fingerprint() != run.tokenizer.fingerprint():
        params = params | {name: state.params[name] for name in _OF_TOKENS}
        kinds = (each.tokenizer.to_json()["kind"] for each in (source, run))
        said += "; its tokens are others ({} there, {} here), so embedding and head are fresh".format(*kinds)
    if source.config.data.length != run.config.data.length:
        said += f"; its length was {source.config.data.length}, here it is {run.config.data.length}"
    return dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params)), said
