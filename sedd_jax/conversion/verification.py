"""Two programs, one network: the PyTorch implementation and ours on the same tokens and noise."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sedd_jax.model import networks, score_heads

_LENGTH = 128
_SIGMAS = (1e-3, 0.1, 1.0, 6.0)
# Of the largest logit: both are float32, and their sums differ in order.
TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """How far two programs' logits are apart.

    Attributes:
        largest_difference: of any two logits.
        largest_logit: what that is to be held against.
    """

    largest_difference: float
    largest_logit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is what float32 explains; a NaN is not."""
        return self.largest_difference <= TOLERANCE * self.largest_logit


def compare(
    model: Any, params: networks.Params, network: networks.NetworkConfig, length: int, *, is_conditioned: bool = True
) -> Comparison:
    """Logits of a `torch_model.SEDD` and of parameters of ours, in float32, for random tokens at four noise levels.

    Args:
        model: the PyTorch network.
        params: ours.
        network: sizes of ours.
        length: that the model was trained on; a part of it is compared.
        is_conditioned: whether the PyTorch network is told the noise, or 0.
    """
    import torch

    network = dataclasses.replace(network, dtype="float32", attention="plain")
    shape = (len(_SIGMAS), min(length, _LENGTH))
    tokens = np.random.default_rng(0).integers(network.num_states, size=shape)
    sigma = np.array(_SIGMAS, np.float32)
    features = networks.apply(networks.Model(network, params), jnp.asarray(tokens, jnp.int32), jnp.asarray(sigma))
    ours = np.asarray(score_heads.logits(params, features))[..., : network.num_states]
    with torch.inference_mode():
        told = torch.from_numpy(sigma if is_conditioned else np.zeros_like(sigma))
        theirs = model.output_layer.linear(model.features(torch.from_numpy(tokens), told)).numpy()
    return Comparison(float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


def load(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """A `torch_model.SEDD` with these tensors."""
    import torch

    from sedd_jax.conversion import torch_model

    model = torch_model.SEDD(dict(config))
    # A checkpoint may lack the frequencies of rotary positions, which are no parameters.
    found = model.state_dict() | {name: torch.from_numpy(np.array(x, np.float32)) for name, x in tensors.items()}
    model.load_state_dict(found)
    return model.eval()
