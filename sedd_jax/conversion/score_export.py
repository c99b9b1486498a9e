"""Export of the score function as StableHLO, for programs without this package.

The exported function takes any batch size and one sequence length. It runs on CPU, CUDA and TPU.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping

import jax
import jax.export  # `import jax` does not load this module.
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sedd_jax.conversion import torch_weights
from sedd_jax.model import networks, score_heads
from sedd_jax.runtime import errors

PLATFORMS = ("cpu", "cuda", "tpu")


def export(tensors: Mapping[str, np.ndarray], network: networks.NetworkConfig, length: int) -> bytes:
    """The serialized function log_score(tensors, tokens, sigma), which returns [batch, length, V] float32.

    It takes tokens [batch, length] int32 and the total noise sigma [batch] float32. Attention is computed by plain
    matrix products, because a kernel for one platform does not run on the others.

    Args:
        tensors: weights under their published names; the function takes tensors of the same names, shapes and dtypes.
        network: sizes of the network.
        length: length of the sequences.

    Raises:
        errors.UserError: if flatbuffers is not installed, which `jax.export` uses to serialize.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise errors.UserError(
            "needs a package that is not installed",
            field="to_format",
            value="stablehlo",
            remedy="pip install flatbuffers",
        )
    # A rolled loop keeps the file small.
    network = dataclasses.replace(network, attention="plain", layer_loop="rolled")

    def log_score(
        tensors: dict[str, jax.Array], tokens: Int[Array, "B L"], sigma: Float[Array, "B"]
    ) -> Float[Array, "B L V"]:
        wide = {name: tensor.astype(jnp.float32) for name, tensor in tensors.items()}
        params = torch_weights.arrange(wide, network, jnp)
        model = networks.Model(network, params)
        return score_heads.log_score(model, networks.apply(model, tokens, sigma), tokens, sigma)

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    inputs = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    return bytes(jax.export.export(jax.jit(log_score), platforms=PLATFORMS)(shapes, *inputs).serialize())
