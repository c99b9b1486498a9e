"""The published optimizer: AdamW with linear warm-up, gradient clipping, and a moving average of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters, with the published values as defaults.

    Attributes:
        learning_rate: learning rate after warm-up, constant from then on.
        warmup_steps: steps of linear warm-up; step n (from 1) uses learning_rate min(n / warmup_steps, 1).
        beta1: Adam's decay of the gradient average.
        beta2: Adam's decay of the squared gradient average.
        eps: Adam's epsilon, added to the root of the second moment.
        weight_decay: decoupled weight decay (AdamW).
        clip_norm: largest global norm of the gradients; larger gradients are scaled down to it.
        ema_decay: decay of the exponential moving average (EMA) of the parameters; smaller in the first steps.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 2500
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW with the warm-up schedule."""
    return optax.chain(
        optax.stateless(lambda grads, params: clip(grads, config.clip_norm)),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def clip(grads: Any, max_norm: float) -> Any:
    """Gradients scaled down to a global norm of at most max_norm.

    Scaling is one product with a scalar, which XLA fuses into the update. optax's own clipping divides, and XLA then
    keeps a second copy of all gradients.
    """
    scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)


def learning_rate(config: OptimizerConfig, step: ArrayLike) -> Float[Array, ""]:
    """Learning rate of the update at `step` (int scalar, traced or not), counted from 0."""
    return config.learning_rate * jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)


def update_ema(ema_params: Any, params: Any, num_updates: Int[Array, ""] | int, decay: float) -> Any:
    """The moving average after update n = `num_updates` (from 1), with decay min(decay, (1 + n) / (10 + n))."""
    rate = 1 - jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))
    return jax.tree.map(lambda ema, new: ema - rate * (ema - new), ema_params, params)
