"""Initial weights from another run: fine-tuning of a converted checkpoint or of one's own model."""

import dataclasses

import jax
import jax.numpy as jnp

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import train_state
from sedd_jax.runtime import errors, processes, storage

# Both runs must agree on these. Length, noise schedule and tokenizer may differ.
_SAME = (
    "network.hidden_size",
    "network.num_layers",
    "network.num_heads",
    "network.cond_dim",
    "network.mlp_ratio",
    "network.scale_by_sigma",
    "network.normalize",
)
_STEP = "init_from_step.txt"
_OF_TOKENS = ("embedding", "head_kernel", "head_bias")


def check(config: configs.Config) -> None:
    """Raises errors.UserError if config.init_from is no run directory, or its network differs in kind or size."""
    directory = storage.directory(config.init_from)
    if not storage.holds(directory, storage.CHECKPOINTS):
        raise errors.UserError(
            "is no run directory",
            field="config.init_from",
            value=directory,
            remedy=f"`sedd convert --from={directory} --to=DIR` makes one of a published model",
        )
    source = runs.load(directory).config
    if source.graph.name != config.graph.name:
        raise errors.UserError(
            f"has {errors.name('config.graph.name')}={source.graph.name}, this run {config.graph.name}",
            field="config.init_from",
            value=config.init_from,
            remedy="what the one has learned means nothing to the other; start without init_from",
        )
    ours, theirs = (configs.flatten(configs.to_dict(each)) for each in (config, source))
    for name in _SAME:
        if ours[name] != theirs[name]:
            raise errors.UserError(
                f"must be {theirs[name]}, as in {errors.name('config.init_from')}={config.init_from}",
                field=f"config.{name}",
                value=ours[name],
            )


def take(run: runs.Run, state: train_state.TrainState, mesh: jax.sharding.Mesh) -> tuple[train_state.TrainState, str]:
    """Puts the moving average of config.init_from's newest checkpoint into a fresh state.

    Its step is kept in the run directory, so that a run that is killed before its first checkpoint begins again with
    the same weights. If the tokenizers differ, the embedding and the head stay fresh.

    Args:
        run: the run that starts.
        state: its fresh state.
        mesh: mesh of the state.

    Returns:
        The state, and a message for the user that says which weights were taken.
    """
    source = runs.load(storage.directory(run.config.init_from))
    kept = storage.get_text(run.workdir / _STEP)
    step, params = source.params("ema_params", mesh, None if kept is None else int(kept))
    if kept is None and processes.is_first():
        storage.put_text(run.workdir / _STEP, f"{step}\n")
    said = f"weights are those of step {step} of {run.config.init_from}, averaged"
    if source.tokenizer.fingerprint() != run.tokenizer.fingerprint():
        params = params | {name: state.params[name] for name in _OF_TOKENS}
        kinds = (each.tokenizer.to_json()["kind"] for each in (source, run))
        said += "; its tokens are others ({} there, {} here), so embedding and head are fresh".format(*kinds)
    if source.config.data.length != run.config.data.length:
        said += f"; its length was {source.config.data.length}, here it is {run.config.data.length}"
    return dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params)), said
