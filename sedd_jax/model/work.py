"""Floating-point operations of a step: those that the model needs, and those that are done a second time.

A product with w weights takes 2 w operations per token forward and 4 w backward. Attention takes 4 D L forward and
8 D L backward per token and layer. The head counts at the positions where it runs: for a graph with a mask, at masks.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sedd_jax.diffusion import forward, time_laws
from sedd_jax.model import networks, score_losses

# The rule in one line, for tables.
RULE = (
    "MFU: operations that the model needs, the head at the positions that carry loss, over the peak; HFU: with what is "
    "computed a second time"
)


class Work(NamedTuple):
    """Floating-point operations per token.

    Attributes:
        needed: operations that the model needs, from which model FLOP utilisation (MFU) is computed.
        repeated: operations that are done again to save memory; with them it is hardware FLOP utilisation (HFU).
    """

    needed: float
    repeated: float


def of_training(network: networks.NetworkConfig, share: float, batch_size: int, length: int) -> Work:
    """Work of a training step on the current mesh.

    Args:
        network: sizes.
        share: see `head_share`.
        batch_size: sequences a device.
        length: their tokens.
    """
    blocks, attention, head = _forward(network, length)
    needed = 3 * (blocks + attention + share * head)
    # Every gradient of attention computes the products of queries and keys again.
    repeated = attention / 2
    if network.remat == "blocks":
        repeated += blocks + attention
    if not score_losses.fits(network, batch_size * length):
        repeated += share * head
    return Work(needed, repeated)


def of_evaluation(network: networks.NetworkConfig, length: int, head_share: float) -> Work:
    """Work of one evaluation of the network without a gradient, with the head at a share of the positions."""
    blocks, attention, head = _forward(network, length)
    return Work(blocks + attention + head_share * head, 0.0)


def head_share(network: networks.NetworkConfig, process: forward.Process) -> float:
    """Share of the positions that carry loss, on average over the times of training."""
    if network.causal or not process.graph.has_mask:
        return 1.0
    t = jnp.linspace(time_laws.T_MIN, 1.0, 1001)
    return float(-jnp.expm1(-process.noise.sigma(t)).mean())


def _forward(network: networks.NetworkConfig, length: int) -> tuple[float, float, float]:
    """Operations of a forward pass per token: products of the blocks, attention, and the head."""
    d = network.hidden_size
    blocks = 2.0 * network.num_layers * (4 + 2 * network.mlp_ratio) * d * d
    return blocks, 4.0 * network.num_layers * d * length, 2.0 * d * network.num_states
