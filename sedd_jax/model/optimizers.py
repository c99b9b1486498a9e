"""Optimizers, learning rates by step, gradient clipping, and the moving average of the parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sedd_jax.diffusion import time_laws


def _optimizer_meanings() -> dict[str, str]:
    return {
        "adamw": "as published",
        "muon": "orthogonal updates of the matrices in blocks, of the size of Adam's, and AdamW with Nesterov momentum "
        "for all other arrays",
    }


def _schedule_meanings() -> dict[str, str]:
    return {
        "constant": "as published",
        "wsd": "constant, then linearly to 0 over the last `decay_share` of the steps",
        "cosine": "half a cosine from the end of warm-up to 0 at the last step",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters, with the published values as defaults.

    Attributes:
        name: the optimizer.
        learning_rate: learning rate at the end of warm-up.
        warmup_steps: steps of linear warm-up; step n (from 1) uses learning_rate min(n / warmup_steps, 1).
        schedule: learning rate after warm-up.
        decay_share: share of the steps over which the schedule wsd decays.
        beta1: Adam's decay of the gradient average.
        beta2: Adam's decay of the squared gradient average.
        eps: Adam's epsilon, added to the root of the second moment.
        weight_decay: decoupled weight decay (AdamW).
        clip_norm: largest global norm of the gradients; larger gradients are scaled down to it. 0 clips nothing.
        ema_decay: decay of the exponential moving average (EMA) of the parameters; smaller in the first steps.
    """

    name: str = dataclasses.field(default="adamw", metadata={"choices": _optimizer_meanings})
    learning_rate: float = 3e-4
    warmup_steps: int = 2500
    schedule: str = dataclasses.field(default="constant", metadata={"choices": _schedule_meanings})
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


OPTIMIZERS, SCHEDULES = tuple(_optimizer_meanings()), tuple(_schedule_meanings())
# Root mean square of a Muon update at learning rate 1, about that of Adam's (Liu et al. 2025, section 2.2).
_MUON_RMS = 0.2


def make_optimizer(
    config: OptimizerConfig, num_steps: int, time_law: str = "uniform"
) -> optax.GradientTransformationExtraArgs:
    """Gradient clipping, then AdamW or Muon, for a run of `num_steps` steps.

    With the time law "learned" the first part of its state is `time_laws.Moments`, and updates also need the `times`
    (t) of all sequences and their `losses`.
    """
    rate = functools.partial(learning_rate, config, num_steps=num_steps)
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=_MUON_RMS,
        )
    else:
        optimizer = optax.adamw(
            rate, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay
        )
    clipped = optax.chain(optax.stateless(lambda grads, params: clip(grads, config.clip_norm)), optimizer)
    if time_law == "learned":
        return optax.chain(_remember_losses(), clipped)
    return optax.with_extra_args_support(clipped)


def _remember_losses() -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of the loss by time; gradients pass as they are."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, time_laws.Moments]:
        return updates, time_laws.add_losses(state, extra_args["times"], extra_args["losses"])

    return optax.GradientTransformationExtraArgs(lambda params: time_laws.no_moments(), update)


def _matrices(params: Any) -> Any:
    """Which axes of an array are a matrix that Muon updates; None for an array that AdamW updates.

    These are the kernels of attention and MLP, one matrix a layer.
    """

    def axes(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [part.key for part in path]
        is_matrix = names[0] == "blocks" and names[-1] == "kernel" and names[1] != "modulation"
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def clip(grads: Any, max_norm: float) -> Any:
    """Gradients scaled down to a global norm of at most max_norm, or as they are if that is 0.

    Scaling is one product with a scalar, which XLA fuses into the update. optax's own clipping divides, and XLA then
    keeps a second copy of all gradients.
    """
    if max_norm == 0:
        return grads
    scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)


def learning_rate(config: OptimizerConfig, step: ArrayLike, num_steps: int) -> Float[Array, ""]:
    """Learning rate of the update at `step` (int scalar, traced or not), counted from 0, in a run of `num_steps`."""
    warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
    if config.schedule == "wsd":
        decay = jnp.clip((num_steps - step) / max(config.decay_share * num_steps, 1.0), 0.0, 1.0)
    elif config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
        decay = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0))) / 2
    else:
        decay = 1.0
    return config.learning_rate * warmup * decay


def update_ema(ema_params: Any, params: Any, num_updates: Int[Array, ""] | int, decay: float) -> Any:
    """The moving average after update n = `num_updates` (from 1), with decay min(decay, (1 + n) / (10 + n))."""
    rate = 1 - jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))
    return jax.tree.map(lambda ema, new: ema - rate * (ema - new), ema_params, params)
