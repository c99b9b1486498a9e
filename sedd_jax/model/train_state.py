"""Everything a run needs to go on: step, parameters, their moving average, and the optimizer's state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from sedd_jax.model import networks


@flax.struct.dataclass
class TrainState:
    """State of a run. Keys are folded from the step and data is a function of it, so neither is stored.

    Attributes:
        step: optimizer steps taken, an int32 scalar.
        params: parameters of `networks.ScoreNetwork`.
        ema_params: their moving average, used for evaluation and sampling.
        opt_state: optax state.
    """

    step: Any  # As a pytree it also carries shardings and shapes in place of arrays.
    params: networks.Params
    ema_params: networks.Params
    opt_state: Any


def create(key: PRNGKeyArray, config: networks.NetworkConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state: step 0, the average equal to the parameters."""
    params = networks.init(key, config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )
