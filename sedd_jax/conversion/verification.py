"""Comparison of the network in PyTorch with ours, on the same tokens and noise levels."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sedd_jax.model import networks, score_heads

_LENGTH = 128
_SIGMAS = (1e-3, 0.1, 1.0, 6.0)
# Relative to the largest logit. Both networks are float32, but they sum in different orders.
TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """The difference between the outputs of two programs.

    Attributes:
        largest_difference: largest absolute difference of two logits.
        largest_logit: largest absolute logit, to judge the difference by.
        largest_score_difference: largest absolute difference of two log scores, which are made of the logits, the
            current token and the noise level; None for the autoregressive baseline, which has none.
        largest_log_score: largest absolute log score; None likewise.
    """

    largest_difference: float
    largest_logit: float
    largest_score_difference: float | None
    largest_log_score: float | None

    @property
    def agrees(self) -> bool:
        """Whether float32 rounding explains the differences; False for a NaN."""
        if not self.largest_difference <= TOLERANCE * self.largest_logit:
            return False
        if self.largest_score_difference is None or self.largest_log_score is None:
            return True
        return self.largest_score_difference <= TOLERANCE * max(self.largest_log_score, self.largest_logit)

    def __str__(self) -> str:
        """How much logits and log scores differ, and the largest of them."""
        found = (
            f"logits of PyTorch and JAX differ by at most {self.largest_difference:.2g}; the largest is "
            f"{self.largest_logit:.4g}"
        )
        if self.largest_score_difference is None:
            return found
        return f"{found}; log scores by {self.largest_score_difference:.2g}, of {self.largest_log_score:.4g}"


def compare(
    model: Any, params: networks.Params, network: networks.NetworkConfig, length: int, *, is_conditioned: bool = True
) -> Comparison:
    """Compares logits and log scores of a PyTorch network with ours in float32, on random tokens at four noise levels.

    Args:
        model: a `torch_model.SEDD`.
        params: our parameters.
        network: sizes of our network.
        length: sequence length of the model; at most 128 positions are compared.
        is_conditioned: whether the PyTorch network receives the noise level; if not, it receives 0.
    """
    import torch

    network = dataclasses.replace(network, dtype="float32", attention="plain")
    shape = (len(_SIGMAS), min(length, _LENGTH))
    tokens = np.random.default_rng(0).integers(network.num_states, size=shape)
    tokens[:, ::2] = network.num_states - 1  # The mask of the absorbing graph, where its scores count.
    sigma = np.array(_SIGMAS, np.float32)
    model_of_ours = networks.Model(network, params)
    features = networks.apply(model_of_ours, jnp.asarray(tokens, jnp.int32), jnp.asarray(sigma))
    ours = np.asarray(score_heads.logits(model_of_ours, features))[..., : network.num_states]
    with torch.inference_mode():
        told = torch.from_numpy(sigma if is_conditioned else np.zeros_like(sigma))
        features_of_theirs = model.features(torch.from_numpy(tokens), told)
        theirs = model.output_layer.linear(features_of_theirs).numpy()
        found = (float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))
        if network.causal:
            return Comparison(*found, None, None)
        scores = model.log_score(features_of_theirs, torch.from_numpy(tokens), torch.from_numpy(sigma)[:, None])
        theirs = scores.numpy()
    inputs = jnp.asarray(tokens, jnp.int32), jnp.asarray(sigma)
    ours = np.asarray(score_heads.log_score(model_of_ours, features, *inputs))
    return Comparison(*found, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


def load(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, is_causal: bool = False) -> Any:
    """A `torch_model.SEDD` with these tensors, in evaluation mode; its attention is causal if asked for."""
    import torch

    from sedd_jax.conversion import torch_model

    model = torch_model.SEDD(dict(config))
    blocks: Any = model.blocks
    for block in blocks:
        block.is_causal = is_causal
    # A checkpoint may lack the rotary frequencies, because they are not parameters.
    found = model.state_dict() | {name: torch.from_numpy(np.array(x, np.float32)) for name, x in tensors.items()}
    model.load_state_dict(found)
    return model.eval()
