"""The published optimizer: AdamW with linear warm-up and clipping, and the moving average of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters, with the published values.

    Attributes:
        learning_rate: step size after warm-up, constant from there.
        warmup_steps: steps of linear warm-up; step n (from 1) uses learning_rate min(n / warmup_steps, 1).
        beta1: decay of the gradient's average.
        beta2: decay of the squared gradient's average.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        clip_norm: global norm to which gradients are clipped.
        ema_decay: largest decay of the moving average.
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
    """Clipping, then AdamW under the warm-up schedule."""
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
    """Scales gradients down to a global norm of at most max_norm.

    By one product with a scalar, which the update's arithmetic absorbs; optax's own divides, and XLA then keeps a
    second copy of all gradients.
    """
    scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads)


def learning_rate(config: OptimizerConfig, step: Any) -> Float[Array, ""]:
    """Learning rate of the update taken at `step` (an int scalar, traced or not), counted from 0."""
    return config.learning_rate * jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)


def update_ema(ema_params: Any, params: Any, num_updates: Int[Array, ""] | int, decay: float) -> Any:
    """Moves the average toward `params` with decay min(decay, (1 + n) / (10 + n)), n = updates, this one included."""
    rate = 1 - jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))
    return jax.tree.map(lambda ema, new: ema - rate * (ema - new), ema_params, params)
