"""The score function as StableHLO, for programs without this package: any batch, one length, on CPU, CUDA and TPU."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.export  # A module that jax does not load by itself.
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.conversion import torch_weights
from sedd_jax.model import networks, score_heads
from sedd_jax.runtime import errors

PLATFORMS = ("cpu", "cuda", "tpu")


def export(tensors: Mapping[str, np.ndarray], network: networks.NetworkConfig, length: int) -> bytes:
    """Serialises log_score(tensors, tokens [batch, length] int32, sigma [batch] float32) -> [batch, length, V] float32.

    Attention is plain products, since the kernels of one platform do not run on the others.

    Args:
        tensors: the network's in the published names, as they will be given to it.
        network: sizes.
        length: of the sequences.

    Raises:
        errors.UserError: where flatbuffers, which `jax.export` writes with, is not installed.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise errors.UserError(
            "takes a package that is not installed",
            field="to_format",
            value="stablehlo",
            remedy="pip install flatbuffers",
        )
    network = dataclasses.replace(network, attention="plain")

    def log_score(tensors: Any, tokens: Int[Array, "B L"], sigma: Float[Array, "B"]) -> Float[Array, "B L V"]:
        wide = {name: tensor.astype(jnp.float32) for name, tensor in tensors.items()}
        params = torch_weights.arrange(wide, network, jnp)
        return score_heads.log_score(network, params, networks.apply(network, params, tokens, sigma), tokens, sigma)

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    inputs = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    return bytes(jax.export.export(jax.jit(log_score), platforms=PLATFORMS)(shapes, *inputs).serialize())
