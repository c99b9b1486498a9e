"""The train state: step, parameters, their moving average, and the optimizer state. A run can continue from it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from sedd_jax.model import networks


@flax.struct.dataclass
class TrainState:
    """State of a run. Random keys and data are functions of the step, so neither is stored.

    Attributes:
        step: optimizer steps taken, an int32 scalar.
        params: parameters of `networks.ScoreNetwork`.
        ema_params: exponential moving average of the parameters, used for evaluation and sampling.
        opt_state: state of the optax optimizer.
    """

    step: Any  # Not typed as an array: the pytree also carries shardings and shapes.
    params: networks.Params
    ema_params: networks.Params
    opt_state: Any


def create(key: PRNGKeyArray, config: networks.NetworkConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0: the moving average equals the parameters."""
    params = networks.init(key, config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )
